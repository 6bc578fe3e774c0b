#!/bin/sh
# Runs originals.py with the versions of transformers that the originals' code needs, in environments under DIR.
#
#     tests_torch/originals.sh [DIR]      default: .venv-originals; some minutes and 1 GB the first time
#
# PyTorch, JAX and this package come from .venv-torch (make test-torch). The repositories are cloned into DIR/clones;
# with CLONES=folder those in it are used.
set -eu
cd "$(dirname "$0")/.."
directory=${1:-.venv-originals}
clones=${CLONES:-$directory/clones}
base=.venv-torch/bin/python
mkdir -p "$directory"
if [ -z "${CLONES:-}" ]; then
    for repository in seal-rg/recurrent-pretraining sandyresearch/parcae LoopedLMs/ouro_rl \
        LoopedLMs/retrofitting-recurrence johnhalloran321/Nanbeige4.2-3B-mps-fix; do
        folder=$clones/$(basename "$repository")
        [ -d "$folder" ] || git clone -q --depth 1 "https://github.com/$repository" "$folder"
    done
fi
site=$("$base" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
for version in 4.53.3 4.57.6; do
    environment=$directory/transformers-$version
    if [ ! -f "$environment/.installed" ]; then
        "$base" -m venv "$environment"
        "$environment/bin/python" -m pip --disable-pip-version-check install -q "transformers==$version"
        # After its own packages, those of .venv-torch.
        echo "$site" > "$("$environment/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
        touch "$environment/.installed"
    fi
done
export PYTHONPATH=$PWD JAX_PLATFORMS=cpu HF_HUB_OFFLINE=1 HF_HOME="$directory/huggingface" PYTHONWARNINGS=ignore
"$directory/transformers-4.53.3/bin/python" tests_torch/originals.py "$clones" --only huginn
"$directory/transformers-4.57.6/bin/python" tests_torch/originals.py "$clones"
# The authors' code does not run with transformers 5.
"$base" tests_torch/originals.py "$clones" --only llama llama_tied mistral qwen2 qwen3 olmo2
