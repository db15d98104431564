# The paper's tables and figures, each a chain of ordinary commands. What is done is not done again; -j is safe.
#
#   make table3 DATA=DIR N=200                              on the embedded CIFAR-10 model, 200 test images
#   make tables DATA=DIR N=1000 DEVICE=cuda MODEL=FILE      Tables 3, 5, 8, 9, 10, 11 on a model of `meansparse train`
#   make table2 DATA=DIR MODELS=DIR WIDTH=64                on the models in DIR/METHOD-ACTIVATION-wWIDTH; trained if not there
#   make table2 table6 table7 DATA=DIR MODELS=DIR WIDTH=64 PRESET=paper TRAIN="--paper-selection --beta 0.6"    as the paper trains
#   make table2 DATA=DIR WIDTH=8 TRAIN="--epochs 3 --n-examples 10000"    what N= and QUICK= leave alone: the training
#   make headline DATA=DIR DATA_imagenet=DIR                the eight zoo models; with MODEL=, that one in their place
#
# QUICK=1 leaves out what no claim of the paper's text needs: fewer alphas and eps. Cells that were not run stay empty.
# FRESH=1 begins evaluations anew (Tables 5, 12, headline): needed once after DATA or DEVICE changed. MODEL, MODELS and RUNS are
# paths without spaces; two makes at once need RUNS of their own.
DATA      ?= $(MEANSPARSE_DATA)
DATA_NOTE ?=
N         ?=
DEVICE    ?= auto
MODEL     ?=
MODELS    ?= runs/models
WIDTH     ?= 16
PRESET    ?= short
TRAIN     ?=
RUNS      ?= runs/tables
OUT       ?= docs/tables
QUICK     ?=
FRESH     ?=
N_CLEAN   ?=
INSTALLED ?= $(STAMP)
MEANSPARSE ?= $(BIN)/meansparse

ATTACK    ?= apgd
EPS       ?= 8/255
ALPHAS    ?= $(if $(QUICK),0.2:0.35:0.05,0.05:0.4:0.05)
TWO       ?= 0.2,0.35
EPS_GRID  ?= $(if $(QUICK),1/255$(comma)2/255$(comma)3/255$(comma)4/255$(comma)6/255$(comma)8/255$(comma)12/255$(comma)16/255,1/255:16/255:1/255)
SITE_ALPHAS ?= $(if $(QUICK),0.35,$(TWO))
ON_GPU    := $(filter cuda%,$(DEVICE))
BATCH     ?= $(if $(ON_GPU),1000,250)
SPEED     ?=

comma     := ,
$(foreach path,MODEL MODELS RUNS,$(if $(word 2,$($(path))),$(error $(path)=$($(path)): a path without spaces, please)))
ABLATION  := $(or $(MODEL),resnet18-w16)
SLUG      := $(subst :,_,$(if $(filter %/model.safetensors,$(ABLATION)),$(notdir $(patsubst %/,%,$(dir $(ABLATION)))),$(patsubst %.safetensors,%,$(notdir $(ABLATION)))))
RUN       ?= $(RUNS)/$(SLUG)
FOLDER    := $(if $(DATA),--data-dir '$(DATA)')
ATTACKED  := $(FOLDER) $(if $(N),--n-examples $(N)) --device $(DEVICE) --batch-size $(BATCH)
CLEANLY   := $(FOLDER) $(if $(N_CLEAN),--n-examples $(N_CLEAN)) --device $(DEVICE) --batch-size $(BATCH)
MEASURED  := $(ATTACKED) --block-size $(BATCH) $(SPEED)
PAGE      := -o '$(OUT)' $(if $(DATA_NOTE),--data-note "$(DATA_NOTE)")
LINF      := --norm Linf --eps $(EPS)
ANEW      := $(if $(FRESH),--fresh)
BPDA      := --attack bpda-apgd-ce --attack bpda-apgd-dlr

.PHONY: tables table1 table2 table3 table4 table5 table6 table7 table8 table9 table10 table11 table12 headline \
  table-subset figure1 summary calibrated unattacked unattacked-around-zero unattacked-around-global-mean unattacked-by-site unattacked-to-0.5 in-linf in-l2 by-square by-adaptive-0.2 by-adaptive-0.35 around-zero around-global-mean \
  by-eps by-site by-family on-train on-test

tables: table3 table5 table8 table9 table10 table11 ## the ablation tables that need one model: 3, 5, 8, 9, 10, 11

# ---- one model: $(RUN)

calibrated: $(INSTALLED)
	$(MEANSPARSE) calibrate --run $(RUN) --model $(ABLATION) $(FOLDER) --device $(DEVICE) --batch-size $(BATCH)

# without an attack: clean accuracy takes one forward pass, on all test images or N_CLEAN= of them
unattacked: calibrated
	$(MEANSPARSE) measure --run $(RUN) --name clean --attack none --alphas $(ALPHAS) $(CLEANLY)

unattacked-around-zero unattacked-around-global-mean: unattacked-around-%: calibrated
	$(MEANSPARSE) measure --run $(RUN) --name clean-around-$* --attack none --centre $* --alphas $(ALPHAS) $(CLEANLY)

unattacked-to-0.5: calibrated
	$(MEANSPARSE) measure --run $(RUN) --name clean-to-0.5 --attack none --alphas 0.15:0.5:0.05 $(CLEANLY)

unattacked-by-site: calibrated
	$(MEANSPARSE) measure --run $(RUN) --name clean-sites --attack none --alphas $(SITE_ALPHAS) --sites 'single:*' $(CLEANLY)

in-linf: calibrated
	$(MEANSPARSE) measure --run $(RUN) --name linf $(LINF) --attack $(ATTACK) --alphas $(ALPHAS) $(MEASURED)

in-l2: calibrated
	$(MEANSPARSE) measure --run $(RUN) --name l2 --norm L2 --eps 128/255 --attack $(ATTACK) --alphas $(ALPHAS) $(MEASURED)

by-square: calibrated
	$(MEANSPARSE) measure --run $(RUN) --name square $(LINF) --attack square --alphas $(ALPHAS) $(MEASURED)

by-adaptive-0.2 by-adaptive-0.35: by-adaptive-%: calibrated
	$(MEANSPARSE) evaluate --run $(RUN) --name adaptive-$* $(LINF) --alpha $* --attack adaptive-1-1:0 --attack adaptive $(BPDA) --individual --no-doubts $(ATTACKED) $(SPEED) $(ANEW)

around-zero around-global-mean: around-%: calibrated
	$(MEANSPARSE) measure --run $(RUN) --name $@ $(LINF) --centre $* --attack $(ATTACK) --alphas $(ALPHAS) $(MEASURED)

by-eps: calibrated
	$(MEANSPARSE) measure --run $(RUN) --name eps --norm Linf --eps $(EPS_GRID) --attack $(ATTACK) --alphas $(TWO) $(MEASURED)

by-site: calibrated
	$(MEANSPARSE) measure --run $(RUN) --name sites $(LINF) --attack $(ATTACK) --alphas $(SITE_ALPHAS) --sites 'single:*' --sites 'first:*' $(MEASURED)

by-family: calibrated
	$(MEANSPARSE) measure --run $(RUN) --name families $(LINF) --attack $(ATTACK) --alphas $(ALPHAS) --sites main-path --sites after-addition $(MEASURED)

on-train: calibrated
	$(MEANSPARSE) measure --run $(RUN) --name train --split calibration $(LINF) --attack apgd-ce --alphas 0.15:0.5:0.05 $(MEASURED)

on-test: calibrated
	$(MEANSPARSE) measure --run $(RUN) --name test --split test $(LINF) --attack apgd-ce --alphas 0.15:0.5:0.05 $(MEASURED)

table3: unattacked in-linf in-l2 ## Linf and L2
	$(MEANSPARSE) table 3 $(RUN) $(PAGE)

table4: by-square ## Square Attack
	$(MEANSPARSE) table 4 $(RUN) $(PAGE)

table5: by-adaptive-0.2 by-adaptive-0.35 ## PGD-50 and the paper's adaptive attack
	$(MEANSPARSE) table 5 $(RUN) $(PAGE)

table8: unattacked unattacked-around-zero unattacked-around-global-mean in-linf around-zero around-global-mean ## zero, global mean or channel mean as the reference
	$(MEANSPARSE) table 8 $(RUN) $(PAGE)

table9: by-eps ## eps from 1/255 to 16/255
	$(MEANSPARSE) table 9 $(RUN) $(PAGE)

table10: unattacked-by-site by-site ## each site alone, and the first sites together
	$(MEANSPARSE) table 10 $(RUN) $(PAGE)

table11: by-family ## sites on the main path against those after an addition
	$(MEANSPARSE) table 11 $(RUN) $(PAGE)

summary: $(INSTALLED) ## what became of the paper's claims, on one page, from the tables that are there
	$(MEANSPARSE) table summary -o '$(OUT)'

figure1: calibrated ## a channel before and after, with the band
	mkdir -p '$(OUT)' && cp "$$($(MEANSPARSE) plot $(RUN) --what histogram --alpha 0.2 $(FOLDER) --device $(DEVICE))" '$(OUT)/figure1.png'

# ---- several models: $(MODELS)/METHOD-ACTIVATION-wWIDTH, trained where they are not there

OTHERS := relu elu silu psilu pssilu
KINDS  := $(OTHERS:%=pgd-%) pgd-gelu trades-gelu standard-gelu
# beside the others stands a GELU model of the same recipe, not the embedded one; MODEL= may name it
GELU      := $(if $(MODEL),$(RUN),$(RUNS)/pgd-gelu-w$(WIDTH))
GELU_DONE := $(if $(MODEL),unattacked in-linf,unattacked-pgd-gelu in-linf-pgd-gelu)
.PHONY: $(KINDS:%=calibrated-%) $(KINDS:%=unattacked-%) $(KINDS:%=in-linf-%) by-small-eps-standard-gelu

$(KINDS:%=$(MODELS)/%-w$(WIDTH)/model.safetensors): $(MODELS)/%-w$(WIDTH)/model.safetensors: | $(INSTALLED)
	$(MEANSPARSE) train --preset $(PRESET) --dataset cifar10 --method $(word 1,$(subst -, ,$*)) --activation $(word 2,$(subst -, ,$*)) --width $(WIDTH) --run $(@D) $(FOLDER) --device $(DEVICE) $(TRAIN)

$(KINDS:%=calibrated-%): calibrated-%: $(MODELS)/%-w$(WIDTH)/model.safetensors
	$(MEANSPARSE) calibrate --run $(RUNS)/$*-w$(WIDTH) --model $< $(FOLDER) --device $(DEVICE) --batch-size $(BATCH)

$(KINDS:%=unattacked-%): unattacked-%: calibrated-%
	$(MEANSPARSE) measure --run $(RUNS)/$*-w$(WIDTH) --name clean --attack none --alphas $(ALPHAS) $(CLEANLY)

$(KINDS:%=in-linf-%): in-linf-%: calibrated-%
	$(MEANSPARSE) measure --run $(RUNS)/$*-w$(WIDTH) --name linf $(LINF) --attack $(ATTACK) --alphas $(ALPHAS) $(MEASURED)

by-small-eps-standard-gelu: by-small-eps-%: calibrated-%
	$(MEANSPARSE) measure --run $(RUNS)/$*-w$(WIDTH) --name eps --norm Linf --eps 1/255:8/255:1/255 --attack $(ATTACK) --alphas $(TWO) $(MEASURED)

table2: $(GELU_DONE) $(OTHERS:%=unattacked-pgd-%) $(OTHERS:%=in-linf-pgd-%) ## six activations
	$(MEANSPARSE) table 2 gelu=$(GELU) $(foreach a,$(OTHERS),$(a)=$(RUNS)/pgd-$(a)-w$(WIDTH)) $(PAGE)

table6: $(GELU_DONE) unattacked-trades-gelu in-linf-trades-gelu ## PGD-AT against TRADES
	$(MEANSPARSE) table 6 pgd=$(GELU) trades=$(RUNS)/trades-gelu-w$(WIDTH) $(PAGE)

table7: by-small-eps-standard-gelu ## standard training, by eps
	$(MEANSPARSE) table 7 $(RUNS)/standard-gelu-w$(WIDTH) $(PAGE)

# ---- statistics from a part of the training images

PARTS := 0.1 0.25 0.5 0.75 1
.PHONY: $(PARTS:%=part-%)

# CONFIG=configs/cifar10-l2-wrn-70-16.yaml: that model, its sites, norm, eps and published alpha (under APGD, where the paper has AutoAttack)
CONFIG   ?=
PART_RUN := $(if $(CONFIG),$(RUNS)/$(basename $(notdir $(CONFIG))),$(RUN))-part-

$(PARTS:%=part-%): part-%: $(INSTALLED)
	$(MEANSPARSE) calibrate --run $(PART_RUN)$* $(if $(CONFIG),--config $(CONFIG),--model $(ABLATION)) --fraction $* $(FOLDER) --device $(DEVICE) --batch-size $(BATCH)
	$(MEANSPARSE) measure --run $(PART_RUN)$* --name subset $(if $(CONFIG),--config $(CONFIG),$(LINF) --alphas 0.2) --attack $(ATTACK) $(MEASURED)

table-subset: $(PARTS:%=part-%) ## statistics from 10, 25, 50, 75 % of the training images
	$(MEANSPARSE) table subset $(PARTS:%=$(PART_RUN)%) $(PAGE)

# ---- the headline models of the zoo: configs/NAME.yaml; with MODEL=, that model in the place of one of them

ALL_HEADLINE := cifar10-linf-wrn-94-16 cifar10-linf-rawrn-70-16 cifar10-linf-wrn-70-16 cifar10-l2-wrn-70-16 \
  cifar100-linf-wrn-70-16 imagenet-linf-swin-l imagenet-linf-convnext-l imagenet-linf-rawrn-101-2
HEADLINE ?= $(ALL_HEADLINE)
in_table1  = $(filter cifar10-linf-rawrn% cifar10-linf-wrn-70% %convnext-l %rawrn-101-2,$1)
in_table12 = $(filter %wrn-94-16 cifar10-linf-rawrn% cifar100% %swin-l %convnext-l,$1)
IN_TABLE1  := $(call in_table1,$(HEADLINE))
IN_TABLE12 := $(call in_table12,$(HEADLINE))
# one job a model: a page has what was run in any of them
so_far = $$(ls $(1:%=$(RUNS)/%/calibrate.yaml) 2>/dev/null | sed 's,/calibrate.yaml,,')
# the alpha that the authors chose for each
alpha = $(strip $(if $(filter %l2-wrn-70-16 %rawrn-70-16,$1),0.25,$(if $(filter %linf-wrn-94-16 cifar100%,$1),0.15,$(if $(filter %swin-l,$1),0.1,$(if $(filter %convnext-l,$1),0.3,0.2)))))
folder = $(if $(or $(DATA_$(firstword $(subst -, ,$1))),$(DATA)),--data-dir '$(or $(DATA_$(firstword $(subst -, ,$1))),$(DATA))')
of_model = --config configs/$1.yaml --run $(RUNS)/$1 $(call folder,$1) --device $(DEVICE)
of_attack = $(call of_model,$1) $(if $(N),--n-examples $(N))

.PHONY: $(foreach step,calibrated by-autoattack by-pgd-50 on-test on-train,$(HEADLINE:%=$(step)-%)) by-pgd-50 by-autoattack

$(HEADLINE:%=calibrated-%): calibrated-%: configs/%.yaml $(INSTALLED)
	$(MEANSPARSE) calibrate $(call of_model,$*)

$(HEADLINE:%=by-autoattack-%): by-autoattack-%: calibrated-%
	$(MEANSPARSE) evaluate $(call of_attack,$*) --name autoattack --alpha $(call alpha,$*) --attack standard --attack bpda $(SPEED) $(ANEW)

$(HEADLINE:%=by-pgd-50-%): by-pgd-50-%: calibrated-%
	$(MEANSPARSE) evaluate $(call of_attack,$*) --name pgd-50 --alpha $(call alpha,$*) --attack pgd-50 $(BPDA) --no-doubts $(SPEED) $(ANEW)

$(HEADLINE:%=on-test-%): on-test-%: calibrated-%
	$(MEANSPARSE) measure $(call of_attack,$*) --name test --attack apgd-ce --alphas 0.15:0.5:0.05 $(SPEED)

$(HEADLINE:%=on-train-%): on-train-%: calibrated-%
	$(MEANSPARSE) measure $(call of_attack,$*) --name train --split calibration --attack apgd-ce --alphas 0.15:0.5:0.05 $(SPEED)

ifeq ($(MODEL),)
table1: $(IN_TABLE1:%=on-test-%) $(patsubst %,on-train-%,$(filter cifar10-%,$(IN_TABLE1))) ## APGD-CE by alpha, training and test images
	$(if $(IN_TABLE1),,$(error no model of table 1 in HEADLINE=$(HEADLINE)))$(MEANSPARSE) table 1 $(call so_far,$(call in_table1,$(ALL_HEADLINE))) $(PAGE)

table12: $(IN_TABLE12:%=by-pgd-50-%) ## PGD-50 on the headline models
	$(if $(IN_TABLE12),,$(error no model of table 12 in HEADLINE=$(HEADLINE)))$(MEANSPARSE) table 12 $(call so_far,$(call in_table12,$(ALL_HEADLINE))) $(PAGE)

headline: $(HEADLINE:%=by-autoattack-%) ## clean accuracy and AutoAttack of the headline models
	$(MEANSPARSE) table headline $(call so_far,$(ALL_HEADLINE)) $(PAGE)
else
by-pgd-50 by-autoattack: calibrated
	$(MEANSPARSE) evaluate --run $(RUN) --name $@ $(LINF) $(if $(filter by-pgd-50,$@),--alpha 0.25 --attack pgd-50 $(BPDA) --no-doubts,--alpha 0.2 --attack standard --attack bpda) $(ATTACKED) $(SPEED) $(ANEW)

table1: on-train on-test unattacked-to-0.5
	$(MEANSPARSE) table 1 'WRN-70-16 train=$(RUN)' 'WRN-70-16 test=$(RUN)' $(PAGE)

table12: by-pgd-50
	$(MEANSPARSE) table 12 RaWRN-70-16=$(RUN) $(PAGE)

headline: by-autoattack
	$(MEANSPARSE) table headline WRN-70-16=$(RUN) $(PAGE)
endif
