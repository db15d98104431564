# The paper's tables and figures: `meansparse reproduce` with these variables as its options; its --help says what each means.
#
#   make table3 DATA=DIR N=200                              on the embedded CIFAR-10 model, 200 test images
#   make table3 DATA=DIR N=200 DRY=1                        the chain of commands alone; PLAN=1: what each would cost
#   make tables DATA=DIR N=1000 DEVICE=cuda MODEL=FILE      Tables 3, 5, 8, 9, 10, 11 on a model of `meansparse train`
#   make table2 DATA=DIR MODELS=DIR WIDTH=64                on the models in DIR/METHOD-ACTIVATION-wWIDTH; trained if not there
#   make table2 table6 table7 DATA=DIR MODELS=DIR WIDTH=64 PRESET=paper TRAIN="--paper-selection --beta 0.6"    as the paper trains
#   make table2 DATA=DIR WIDTH=8 TRAIN="--epochs 3 --n-examples 10000"    what N= and QUICK= leave alone: the training
#   make headline DATA=DIR DATA_imagenet=DIR                the eight zoo models; with MODEL=, that one in their place
#
# QUICK=1 leaves out what no claim of the paper's text needs: fewer alphas and eps. Cells that were not run stay empty.
# FRESH=1 begins evaluations anew (Tables 5, 12, headline): needed once after DATA or DEVICE changed. -j2 runs two commands
# side by side, -k goes on after one that failed. MODEL, MODELS and RUNS are paths without spaces; two makes at once need RUNS of
# their own.
DATA       ?= $(MEANSPARSE_DATA)
INSTALLED  ?= $(STAMP)
MEANSPARSE ?= $(BIN)/meansparse
OUT        ?= runs/tables/pages

$(foreach path,MODEL MODELS RUNS,$(if $(word 2,$($(path))),$(error $(path)=$($(path)): a path without spaces, please)))
option   = $(if $($1),--$2 '$($1)')
switch   = $(if $($1),--$2)
OPTIONS  = $(strip $(call option,MODEL,model) $(HEADLINE:%=--only %) $(call option,CONFIG,headline-config) $(call option,DATA,data-dir) \
  $(foreach set,cifar10 cifar100 imagenet,$(if $(DATA_$(set)),--data-dir '$(set)=$(DATA_$(set))')) \
  $(if $(DATA_NOTE),--data-note "$(DATA_NOTE)") $(call option,N,n-examples) $(call option,N_CLEAN,n-clean) \
  $(call switch,QUICK,quick) $(call option,ATTACK,attack) $(call option,EPS,eps) $(call option,ALPHAS,alphas) \
  $(call option,TWO,two-alphas) $(call option,SITE_ALPHAS,site-alphas) $(call option,EPS_GRID,eps-grid) \
  $(call option,SPEED,attack-options) $(call option,WIDTH,width) $(call option,PRESET,preset) $(call option,TRAIN,train-options) \
  $(call option,MODELS,models-dir) $(call option,RUN,run) $(call option,RUNS,runs-dir) $(call option,OUT,output) \
  $(call option,DEVICE,device) $(call option,BATCH,batch-size) $(patsubst -j%,--jobs %,$(filter-out -j,$(filter -j%,$(MAKEFLAGS)))) $(call switch,FRESH,fresh) \
  $(call switch,DRY,dry-run) $(call switch,PLAN,plan) $(if $(findstring k,$(firstword -$(MAKEFLAGS))),--keep-going))

# all that is asked for is one call, which does what several tables need once
ASKED = $(patsubst table%,%,$(patsubst table-%,%,$(filter table1% table2 table3 table4 table5 table6 table7 table8 table9 table-subset \
  headline figure1,$(patsubst tables,table3 table5 table8 table9 table10 table11,$(MAKECMDGOALS)))))

.PHONY: reproduced tables table1 table2 table3 table4 table5 table6 table7 table8 table9 table10 table11 table12 headline table-subset \
  figure1 summary
reproduced: $(INSTALLED)
	$(MEANSPARSE) reproduce $(ASKED) $(OPTIONS)

tables: reproduced ## the ablation tables that need one model: 3, 5, 8, 9, 10, 11
table1: reproduced ## APGD-CE by alpha, training and test images
table2: reproduced ## six activations
table3: reproduced ## Linf and L2
table4: reproduced ## Square Attack
table5: reproduced ## PGD-50 and the paper's adaptive attack
table6: reproduced ## PGD-AT against TRADES
table7: reproduced ## standard training, by eps
table8: reproduced ## zero, global mean or channel mean as the reference
table9: reproduced ## eps from 1/255 to 16/255
table10: reproduced ## each site alone, and the first sites together
table11: reproduced ## sites on the main path against those after an addition
table12: reproduced ## PGD-50 on the headline models
headline: reproduced ## clean accuracy and AutoAttack of the headline models
table-subset: reproduced ## statistics from 10, 25, 50, 75 % of the training images
figure1: reproduced ## a channel before and after, with the band
summary: $(INSTALLED) ## what became of the paper's claims, on one page, from the tables that are there
	$(MEANSPARSE) table summary -o '$(OUT)'
