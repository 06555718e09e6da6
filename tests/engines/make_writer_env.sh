#!/usr/bin/env bash
# Makes the environment in which llm-compressor writes checkpoints that jqx then reads:
# bash tests/engines/make_writer_env.sh DIR
set -euo pipefail
if [ $# -ne 1 ]; then
  echo "usage: bash tests/engines/make_writer_env.sh DIR" >&2
  exit 2
fi
"${PYTHON:-python3}" -m venv "$1"
"$1/bin/pip" install "llmcompressor==0.14.*"
"$1/bin/python" -c "import llmcompressor; print('llm-compressor', llmcompressor.__version__)"
