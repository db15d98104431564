#!/usr/bin/env bash
# Trains the ResNet-18 models of the ablation tables, several side by side on one device, and makes the tables from them.
#
#   DATA=DIR benchmarks/gpu_suite.sh                    everything; from the folder of the Makefile
#   DATA=DIR benchmarks/gpu_suite.sh data wide          these steps only
#
# steps  data         decode DATA once into OUT/data (DATA with train.npz and test.npz is taken as it is)
#        embedded     width 16, GELU, PGD                      (the embedded model; Tables 3 to 11 at reduced size)
#        activations  width 16, the five other activations     (Table 2)
#        methods      width 16, TRADES and standard training   (Tables 6 and 7)
#        wide         width 64, GELU, PGD                      (the paper's network)
#        tables       TABLES (3, 5, 8, 9, 10, 11 and more) on the wide model, the pages in OUT/pages
#        trained      Tables 2, 6 and 7 on the models of width WIDTH
#        bench        our attacks beside pyautoattack's; nothing else should run meanwhile
#        pack         OUT/weights.tar.aa, .ab, ... of at most 15 MiB: cat OUT/weights.tar.* | tar x
#
# The models lie where `make table2 MODELS=OUT` and its like look for them.
#
# Every step can be killed and typed again: what is done is skipped, what was begun goes on from its last epoch.
# MINUTES= bounds the trainings: no epoch is begun that would end later. Exit code: how many steps and
# trainings are not finished; 1 at once where the data cannot be read.
# Everything at a toy size: DEVICE=cpu EPOCHS=1 TRAIN_IMAGES=512 WIDTH=4 WIDE=8 SPEED= EVAL=64 STEPS=1 N=8 TABLE_OPTIONS=QUICK=1
set -u
DATA=${DATA:?DATA=DIR: a folder with torchvision\'s CIFAR-10 files, or train and test as zips, folders or .npz files}
OUT=${OUT:-runs/gpu-suite}
DEVICE=${DEVICE:-cuda}
EPOCHS=${EPOCHS:-30}                 # on a one-cycle schedule
WIDE_EPOCHS=${WIDE_EPOCHS:-$EPOCHS}
WIDTH=${WIDTH:-16}
WIDE=${WIDE:-64}
TRAIN_IMAGES=${TRAIN_IMAGES:-}       # all by default
EVAL=${EVAL:-5000}                   # test images of the final measurement
STEPS=${STEPS:-10}                   # attack steps
MINUTES=${MINUTES:-600}
WORKERS=${WORKERS:-$(nproc)}         # processes that decode
N=${N:-}                             # test images of tables and benchmark, as in tables.mk; all by default
TABLES=${TABLES:-tables table1 table4 table12 headline table-subset}
TABLE_OPTIONS=${TABLE_OPTIONS:-}     # more variables for make: QUICK=1 DATA_NOTE=...
JOBS=${JOBS:-2}                      # of make, side by side on the device
PAGES=${PAGES:-$OUT/pages}
SPEED=${SPEED---precision bf16 --cuda-graphs}
MEANSPARSE=${MEANSPARSE:-meansparse}
PYTHON=${PYTHON:-python3}
here=$(cd "$(dirname "$0")" && pwd)
ends=$(($(date +%s) + MINUTES * 60))
pids=() names=() unfinished=0
mkdir -p "$OUT" || exit 1

train() { # NAME OPTION...: in the background, its messages in OUT/NAME.log
  local name=$1 left=$(((ends - $(date +%s)) / 60))
  shift
  $MEANSPARSE train --preset short --dataset cifar10 --data-dir "$OUT/data" --device "$DEVICE" --epochs "$EPOCHS" \
    --n-steps "$STEPS" --test-examples "$EVAL" ${TRAIN_IMAGES:+--n-examples $TRAIN_IMAGES} $SPEED --time-limit $((left > 0 ? left : 1)) \
    --run "$OUT/$name" "$@" >>"$OUT/$name.log" 2>&1 &
  pids+=($!) names+=("$name")
}

finish() { # wait for all of them
  for i in "${!pids[@]}"; do
    if wait "${pids[$i]}"; then
      echo "${names[$i]}: $(grep -h 'test clean\|done before' "$OUT/${names[$i]}.log" | tail -1)"
    else
      echo "${names[$i]}: not finished (exit code $?): $(tail -1 "$OUT/${names[$i]}.log")"
      unfinished=$((unfinished + 1))
    fi
  done
  pids=() names=()
}

trap 'kill "${pids[@]}" 2>/dev/null; exit 130' INT TERM

tables() { # VARIABLE=VALUE... TARGET...: one that fails does not stop the others
  local more=() outside=(-u MAKEFLAGS -u MFLAGS) name
  eval "more=($TABLE_OPTIONS)"
  for name in SPEED TRAIN PRESET RUN ATTACK EPS ALPHAS BATCH; do outside+=(-u $name); done # mean other things in tables.mk
  env "${outside[@]}" make -k -j "$JOBS" INSTALLED= MEANSPARSE="$MEANSPARSE" DATA="$OUT/data" DEVICE="$DEVICE" RUNS="$OUT/runs" \
    MODELS="$OUT" WIDTH="$WIDTH" OUT="$PAGES" N="$N" MODEL= "${more[@]}" "$@" >>"$OUT/tables.log" 2>&1 &
  pids=($!) # in the background, as a signal would otherwise wait for its end
  wait "$!" || { echo "$*: not finished: $(tail -1 "$OUT/tables.log")"; unfinished=$((unfinished + 1)); }
  pids=()
}

trained() { # whether the models of Tables 2, 6 and 7 are there: make would train them by another recipe
  local missing=() name
  for name in pgd-{gelu,relu,elu,silu,psilu,pssilu} trades-gelu standard-gelu; do
    [ -e "$OUT/$name-w$WIDTH/model.safetensors" ] || missing+=("$name-w$WIDTH")
  done
  [ ${#missing[@]} = 0 ] && return
  echo "tables 2, 6 and 7: not finished: no ${missing[*]}; the steps embedded, activations and methods train them"
  unfinished=$((unfinished + 1))
  return 1
}

for step in ${*:-data bench embedded activations methods finish wide finish tables trained pack}; do
  case $step in
    data) $PYTHON "$here/images_to_npz.py" cifar10 "$DATA" "$OUT/data" "$WORKERS" || exit 1 ;;
    embedded) train "pgd-gelu-w$WIDTH" --width "$WIDTH" ;;
    activations)
      for activation in relu elu silu psilu pssilu; do
        train "pgd-$activation-w$WIDTH" --width "$WIDTH" --activation $activation
      done
      ;;
    methods)
      train "trades-gelu-w$WIDTH" --width "$WIDTH" --method trades
      train "standard-gelu-w$WIDTH" --width "$WIDTH" --method standard
      ;;
    wide) EPOCHS=$WIDE_EPOCHS train "pgd-gelu-w$WIDE" --width "$WIDE" --save-dtype float16 ${SPEED:+--compile} ;;
    tables) finish; tables MODEL="$OUT/pgd-gelu-w$WIDE/model.safetensors" $TABLES ;;
    trained) finish; trained && tables table2 table6 table7 ;;
    bench) # a row in RESULTS.md only at its full size
      $PYTHON "$here/attack_speed.py" --data-dir "$OUT/data" --device "$DEVICE" ${N:+--n-apgd $N --n-standard $N --dry} ||
        unfinished=$((unfinished + 1))
      ;;
    finish) finish ;;
    pack)
      finish
      rm -f "$OUT"/weights.tar.*
      (set -o pipefail; cd "$OUT" && tar c -- */model.safetensors */train.yaml */train.png *.log | split -b 15m - weights.tar.) ||
        { echo "pack: not finished"; unfinished=$((unfinished + 1)); }
      ls -l "$OUT"/weights.tar.*
      ;;
    *) echo "no step $step" >&2; exit 2 ;;
  esac
done
finish
exit $unfinished
