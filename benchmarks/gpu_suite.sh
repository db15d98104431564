#!/usr/bin/env bash
# Trains the ResNet-18 models of the ablation tables, several side by side on one device, and makes the tables from them.
#
#   DATA=DIR benchmarks/gpu_suite.sh [STEP]...      from the folder of the Makefile; the steps are below, all by default
#
# A step that was killed goes on from its last epoch, one that is done is skipped. MINUTES= bounds the trainings. The models lie
# where `make table2 MODELS=OUT` looks for them. Exit code: how many steps and trainings are not finished; 1 without data.
# A toy: DEVICE=cpu EPOCHS=1 TRAIN_IMAGES=512 WIDTH=4 WIDE=8 SPEED= EVAL=64 STEPS=1 N=8 TABLE_OPTIONS=QUICK=1
set -u
DATA=${DATA:?DATA=DIR: a folder with torchvision\'s CIFAR-10 files, or train and test as zips, folders or .npz files}
: "${OUT:=runs/gpu-suite}" "${DEVICE:=cuda}" "${MEANSPARSE:=meansparse}" "${PYTHON:=python3}" "${JOBS:=2}"
: "${SPEED=--precision bf16 --cuda-graphs}" "${PAGES:=$OUT/pages}" "${TABLE_OPTIONS:=}"
: "${WIDTH:=16}" "${WIDE:=64}" "${EPOCHS:=30}" "${WIDE_EPOCHS:=$EPOCHS}" "${STEPS:=10}" "${MINUTES:=600}" "${WORKERS:=$(nproc)}"
: "${EVAL:=5000}" "${TRAIN_IMAGES:=}" "${N:=}"  # test images of the trainings; of training (all); of tables and benchmark (all)
: "${TABLES:=tables table1 table4 table12 headline table-subset}"
here=$(cd "$(dirname "$0")" && pwd) ends=$(($(date +%s) + MINUTES * 60)) pids=() names=() unfinished=0
mkdir -p "$OUT" || exit 1
trap 'kill "${pids[@]}" 2>/dev/null; exit 130' INT TERM

miss() { echo "$*"; unfinished=$((unfinished + 1)); }

train() { # NAME OPTION...: in the background, its messages in OUT/NAME.log
  local name=$1 left=$(((ends - $(date +%s)) / 60)); shift
  $MEANSPARSE train --preset short --dataset cifar10 --data-dir "$OUT/data" --device "$DEVICE" --epochs "$EPOCHS" \
    --n-steps "$STEPS" --test-examples "$EVAL" ${TRAIN_IMAGES:+--n-examples $TRAIN_IMAGES} $SPEED \
    --time-limit $((left > 0 ? left : 1)) --run "$OUT/$name" "$@" >>"$OUT/$name.log" 2>&1 &
  pids+=($!) names+=("$name")
}

finish() { # wait for all of them
  for i in "${!pids[@]}"; do
    wait "${pids[$i]}" && echo "${names[$i]}: $(grep -h 'test clean\|done before' "$OUT/${names[$i]}.log" | tail -1)" ||
      miss "${names[$i]}: not finished (exit code $?): $(tail -1 "$OUT/${names[$i]}.log")"
  done
  pids=() names=()
}

tables() { # VARIABLE=VALUE... TARGET...; the variables of tables.mk that mean other things here stay outside
  local more outside=(-u MAKEFLAGS -u MFLAGS -u SPEED -u TRAIN -u PRESET -u RUN -u ATTACK -u EPS -u ALPHAS -u BATCH)
  eval "more=($TABLE_OPTIONS)"
  env "${outside[@]}" make -k -j "$JOBS" INSTALLED= MEANSPARSE="$MEANSPARSE" DATA="$OUT/data" DEVICE="$DEVICE" RUNS="$OUT/runs" \
    MODELS="$OUT" WIDTH="$WIDTH" OUT="$PAGES" N="$N" MODEL= "${more[@]}" "$@" >>"$OUT/tables.log" 2>&1 &
  pids=($!) # in the background, as a signal would otherwise wait for its end
  wait "$!" || miss "$*: not finished: $(tail -1 "$OUT/tables.log")"
  pids=()
}

trained() { # whether the models of Tables 2, 6 and 7 are there: make would train them by another recipe
  local missing=() name
  for name in {pgd-{gelu,relu,elu,silu,psilu,pssilu},trades-gelu,standard-gelu}-w$WIDTH; do
    [ -e "$OUT/$name/model.safetensors" ] || missing+=("$name")
  done
  [ ${#missing[@]} = 0 ] && return
  miss "tables 2, 6 and 7: not finished: no ${missing[*]}; the steps embedded, activations and methods train them"
  return 1
}

for step in ${*:-data bench embedded activations methods finish wide finish tables trained pack}; do
  case $step in
    data) $PYTHON "$here/images_to_npz.py" cifar10 "$DATA" "$OUT/data" "$WORKERS" || exit 1 ;; # npz files as they are
    embedded) train "pgd-gelu-w$WIDTH" --width "$WIDTH" ;; # the embedded model
    activations) for a in relu elu silu psilu pssilu; do train "pgd-$a-w$WIDTH" --width "$WIDTH" --activation $a; done ;;
    methods) for m in trades standard; do train "$m-gelu-w$WIDTH" --width "$WIDTH" --method $m; done ;; # Tables 6 and 7
    wide) EPOCHS=$WIDE_EPOCHS train "pgd-gelu-w$WIDE" --width "$WIDE" --save-dtype float16 ${SPEED:+--compile} ;; # the paper's
    tables) finish; tables MODEL="$OUT/pgd-gelu-w$WIDE/model.safetensors" $TABLES ;; # on the wide model
    trained) finish; trained && tables table2 table6 table7 ;; # on the models of width WIDTH
    # our attacks beside pyautoattack's, while nothing else runs; a row in RESULTS.md only at its full size
    bench) $PYTHON "$here/attack_speed.py" --data-dir "$OUT/data" --device "$DEVICE" ${N:+--n-apgd $N --n-standard $N --dry} ||
      miss "bench: not finished" ;;
    finish) finish ;;
    pack) # in parts of at most 15 MiB: cat OUT/weights.tar.* | tar x
      finish; rm -f "$OUT"/weights.tar.*
      (set -o pipefail; cd "$OUT" && tar c -- */model.safetensors */train.yaml */train.png *.log | split -b 15m - weights.tar.) ||
        miss "pack: not finished"
      ls -l "$OUT"/weights.tar.* ;;
    *) echo "no step $step" >&2; exit 2 ;;
  esac
done
finish; exit $unfinished
