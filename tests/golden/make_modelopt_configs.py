# SPDX-License-Identifier: Apache-2.0
"""Make modelopt_configs.json: every configuration that ModelOpt names, as it is.

Run in an environment that has torch and nvidia-modelopt:
`python tests/golden/make_modelopt_configs.py`. Numbers that are keys become text, tuples lists;
entries that many configurations share are written once, and `configs` below puts them back.
"""

import json
import sys
from pathlib import Path


def constants() -> dict[str, dict]:
    """ModelOpt's constants, and the two presets of the KV cache that are none."""
    from modelopt.torch.quantization import config

    named = (name for name in dir(config) if name.endswith(("_CFG", "_CONFIG")))
    found = {name: getattr(config, name) for name in named}
    for name in ("fp8_cast", "nvfp4_cast"):
        found[name] = config._load_quantize_config_dict(f"configs/ptq/presets/kv/{name}")
    return {name: value for name, value in found.items() if isinstance(value, dict)}


PATH = Path(__file__).with_name("modelopt_configs.json")


def configs() -> dict[str, dict]:
    """What is stored: name -> configuration."""
    stored = json.loads(PATH.read_text())
    return {
        name: {**config, "quant_cfg": [stored["entries"][i] for i in config["quant_cfg"]]}
        for name, config in stored["configs"].items()
    }


if __name__ == "__main__":
    import modelopt

    entries: dict[str, int] = {}
    lines = []
    for name, config in sorted(constants().items()):
        texts = [json.dumps(entry) for entry in config["quant_cfg"]]
        numbers = [entries.setdefault(text, len(entries)) for text in texts]
        lines.append(f"{json.dumps(name)}: {json.dumps({**config, 'quant_cfg': numbers})}")
    made_with = json.dumps({"modelopt": modelopt.__version__})
    rows, body = ",\n".join(entries), ",\n".join(lines)
    PATH.write_text(
        f'{{"made_with": {made_with},\n"entries": [\n{rows}\n],\n"configs": {{\n{body}\n}}}}\n'
    )
    print(f"{PATH}: {len(lines)}, python {sys.version_info.major}.{sys.version_info.minor}")
