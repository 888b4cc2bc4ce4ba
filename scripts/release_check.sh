#!/usr/bin/env bash
# Checks a release of what is committed, by hand; needs a package index and some GB of disk:
#
#     bash scripts/release_check.sh wheel     # builds the wheel and uses it outside the repository
#     bash scripts/release_check.sh oldest    # the tests with the oldest allowed dependencies
#     bash scripts/release_check.sh newest    # the tests with the newest ones
#
# The last two take options of pytest. Each part has an environment in $RELEASE_CHECK (default
# /tmp/release_check), which is kept: a second try installs only what is missing. For a CPU build of
# torch, name it in PIP_CONSTRAINT.
set -euo pipefail
cd "$(dirname "$0")/.."

part=${1:-}
case $part in
    wheel | oldest | newest) shift ;;
    *)
        echo "error: part '$part': expected wheel, oldest or newest" >&2
        exit 2
        ;;
esac
folder=${RELEASE_CHECK:-/tmp/release_check}
source=$folder/source
environment=$folder/$part
rm -rf "$source" "$folder/dist"
mkdir -p "$source"
git archive HEAD | tar -x -C "$source"
"${PYTHON:-python3}" -m pip wheel --quiet --no-deps --wheel-dir "$folder/dist" "$source"
wheel=$(echo "$folder"/dist/*.whl)
echo "built $wheel"
[ -x "$environment/bin/python" ] || "${PYTHON:-python3}" -m venv "$environment"
pip=("$environment/bin/python" -m pip install --quiet --disable-pip-version-check)
"${pip[@]}" --force-reinstall --no-deps "$wheel"

# show PACKAGE...: the installed versions
show() {
    "$environment/bin/python" -c 'import importlib.metadata as m, sys
print(", ".join(f"{name} {m.version(name)}" for name in sys.argv[1:]))' "$@"
}

if [ "$part" != wheel ]; then
    : > "$folder/constraints.txt"
    if [ "$part" = oldest ]; then # the lower bounds of setup.cfg
        sed -nE 's/^ +([a-z-]+)>=([0-9.]+)$/\1==\2/p' setup.cfg | sort -u > "$folder/constraints.txt"
    fi
    "${pip[@]}" --constraint "$folder/constraints.txt" "$wheel[test]"
    show torch transformers tokenizers tensorboard tqdm charset-normalizer datasets numpy
    cd "$source"
    exec "$environment/bin/python" -m pytest -n auto --maxprocesses 4 "$@"
fi

"${pip[@]}" "$wheel[adapt]"
show bert-pretrain torch transformers
outside=$folder/outside
rm -rf "$outside"
mkdir -p "$outside"
cd "$outside"
export PATH=$environment/bin:$PATH HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=passive
for command in "$environment"/bin/bert-*; do
    begin=$(date +%s%N)
    version=$("$command" --version)
    "$command" --help > /dev/null
    echo "$(basename "$command"): $version; --version and --help $((($(date +%s%N) - begin) / 1000000)) ms"
done
for number in $(seq 200); do
    printf 'The river is deep, number %s.\nA bank has money.\nIt rains.\n\n' "$number"
done > text.txt
for rows in train valid; do
    { echo text,label && for number in $(seq 20); do
        printf 'the river %s,water\nthe bank %s,money\n' "$number" "$number"
    done; } > "$rows.csv"
done
bert-pretrain --train text.txt --model tiny --vocab-size 200 --max-length 32 --max-steps 10 \
    --batch-size 8 --output runs/tiny
bert-pretrain --resume --output runs/tiny
bert-fill-mask --model runs/tiny "The [MASK] is deep."
bert-finetune --model runs/tiny --train train.csv --valid valid.csv --epochs 2 --output runs/classes
bert-predict --model runs/classes --input valid.csv --output predicted.csv
bert-evaluate --model runs/tiny --input text.txt
bert-show-masks --model runs/tiny --train text.txt
bert-domain --input river=text.txt labels=train.csv --output runs/domain
mkdir -p tasks/rivers
cp train.csv valid.csv tasks/rivers
bert-suite --model runs/tiny --tasks tasks --seeds 1 --output runs/suite
bert-adapt --model runs/tiny --text text.txt --train train.csv --valid valid.csv --test valid.csv \
    --seeds 2 --pretrain "--max-steps 5" --finetune "--epochs 1" --output runs/answer
bert-pretrain --max-steps 3 --output runs/demo # the embedded text
echo "the wheel works in $outside"
