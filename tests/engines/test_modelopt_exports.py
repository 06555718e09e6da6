# SPDX-License-Identifier: Apache-2.0
"""What ModelOpt wrote, read here and by vLLM: the same logprobs, also after it was turned into
another layout. Needs the directory of its exports beside the repository.
"""

import numpy as np
import pytest
from engine_results import Here, compare, picked, within
from engine_runs import ENGINES, run

import jqx_interop as ji

pytestmark = pytest.mark.engine

READ = (
    *("fp8", "fp8_mse", "fp8_kvfp8", "fp8_kvfp8_cast", "fp8_pc_pt", "fp8_pb_wo"),
    *("nvfp4", "nvfp4_kvfp8", "nvfp4_4o6", "nvfp4_awq_clip", "nvfp4_headroom", "nvfp4_mlp_only"),
    *("nvfp4_omlp_only", "nvfp4_mse_sweep", "nvfp4_local_hessian"),
    *("w4a16_nvfp4", "mxfp8", "mixed_fp8_nvfp4"),
)
"""Exports that vLLM reads as they are."""

TURNED = (
    *(("int4_wo", "compressed-tensors"), ("int4_gptq", "compressed-tensors"), ("int4_wo", "gptq")),
    *(("int8", "compressed-tensors"), ("int8_wo", "compressed-tensors")),
    *(("fp8", "compressed-tensors"), ("nvfp4_kvfp8", "compressed-tensors")),
    *(("mxfp4", "compressed-tensors"), ("mixed_fp8_nvfp4", "compressed-tensors")),
)
"""Exports, and the layouts in which vLLM reads them."""

REFUSED = ("int4_awq", "int8", "nvfp4_awq", "w4a8_awq", "mxfp4", "nvfp4_svdquant")
"""Names that vLLM does not know in ModelOpt's layout."""

FLOAT32 = (2e-6, 2e-6, 2e-5)
"""The difference of the unquantized model, in float32."""

EMULATED = ENGINES["vLLM, emulated"]


@pytest.fixture(scope="module")
def given(engines, shared, tmp_path_factory):
    """Prompts, exports by key, what is said of them, and the logprobs of the base."""
    golden, folder = shared / "golden", tmp_path_factory.mktemp("turned")
    prompts = np.load(golden / "calib_ids.npy")[1].astype(np.int32)
    paths = {key: golden / key for key in ("base", *READ, *REFUSED)}
    for key, target in TURNED:
        paths[f"{key} as {target}"] = folder / f"{key}-{target}"
        # GPTQ's layout has scales in float16
        ji.export(golden / key, folder / f"{key}-{target}", target, round_scales=True)
    plain = picked(Here(golden / "base").logprobs(prompts)[:, :-1], prompts[:, 1:])
    return prompts, paths, run(EMULATED, engines, paths, prompts, folder), plain


@pytest.mark.parametrize("key", [*READ, *(f"{key} as {target}" for key, target in TURNED)])
def test_an_export_of_modelopt_is_what_it_is_here(key, given):
    prompts, paths, answers, plain = given
    here = Here(paths[key], EMULATED)
    fields = {"kind": here.kind(EMULATED), **compare(answers[key], here, plain, prompts)}
    assert fields["error"] is None, fields["error"]
    assert within(fields, FLOAT32), fields


@pytest.mark.parametrize("key", REFUSED)
def test_what_vllm_does_not_know(key, given):
    assert "ModelOpt currently only supports" in given[2][key]["error"]
