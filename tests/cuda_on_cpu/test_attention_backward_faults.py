"""Attention's Hopper gradients with a fault are found wrong, or stopped, as forward is in
test_attention_faults.py."""

import shutil

import pytest
from cuda_on_cpu.harness import SOURCES
from cuda_on_cpu.test_attention_faults import compiled, run

pytestmark = pytest.mark.here

BOTH, KEYS, QUERIES = (f"attention_sm90_backward{of}.cuh" for of in ("", "_keys", "_queries"))
WAIT_FOR_DK = "      wgmma_wait<0>();\n" + "".join(
    f"      fence_registers({x});\n" for x in ("dk", "dv", "p", "ds")
)
# name: (kernels it is in, file, the right text, what stands there instead); IT is its switch.
PLANTED = {
    "transposed operand": (
        *("keys queries", BOTH, "    wgmma<T, kMN>(d, a[step]"),
        "    if (IT) wgmma<T, kK>(d, a[step], operand_k(b, 16 * kSteps, 0, 16 * step), true);\n"
        "    else wgmma<T, kMN>(d, a[step]",
    ),
    "no delta": ("keys", BOTH, "dp[i] - known.x", "dp[i] - (IT ? 0 : known.x)"),
    "mask off by one": (
        *("keys", "attention_tiles.cuh", "keys.offset = -place_of(shape, sequence).offset;"),
        "keys.offset = -place_of(shape, sequence).offset + IT;",
    ),
    "proxy fence missing": (
        *("keys queries", "attention_sm90.cuh", "  fence_proxy_async();"),
        "  if (!IT) fence_proxy_async();",
    ),
    "queries not cleared": (
        *("keys", KEYS, "      clear_rows<Tile::kM, Tile::kWidth>(shared.q"),
        "      if (!IT) clear_rows<Tile::kM, Tile::kWidth>(shared.q",
    ),
    "dy not cleared": (
        *("keys", KEYS, "      clear_rows<Tile::kM, Tile::kWidth>(shared.dy"),
        "      if (!IT) clear_rows<Tile::kM, Tile::kWidth>(shared.dy",
    ),
    "absent queries' lse": (
        "keys",
        KEYS,
        "is_present ? arguments.lse",
        "IT || is_present ? arguments.lse",
    ),
    "rows not waited for": ("keys", KEYS, "full[stage], 2);", "full[stage], IT ? 1 : 2);"),
    "one head for all": ("keys", KEYS, "* group + member", "* group + (IT ? 0 : member)"),
    "wrong stage": (
        "keys",
        KEYS,
        "issue_scores(s, dp, stage);",
        "issue_scores(s, dp, IT ? 0 : stage);",
    ),
    "keys not waited for": (
        *("keys", KEYS, "    mbarrier_wait(&shared.barriers().keys, 0);"),
        "    if (!IT) mbarrier_wait(&shared.barriers().keys, 0);",
    ),
    "queries not waited for": (
        *("keys", KEYS, "      mbarrier_wait(&shared.barriers().full[stage]"),
        "      if (!IT) mbarrier_wait(&shared.barriers().full[stage]",
    ),
    "loaded before freed": (
        *("keys", KEYS, "ring.parity(Tile::kStages) ^ 1);"),
        "ring.parity(Tile::kStages) ^ 1 ^ IT);",
    ),
    "scores not waited for": (
        *("keys", KEYS, "      wgmma_wait<1>();\n      fence_registers(s);"),
        "      if (!IT) wgmma_wait<1>();\n      fence_registers(s);",
    ),
    "dP not waited for": (
        *("keys", KEYS, "      wgmma_wait<1>();\n      fence_registers(dp);"),
        "      if (!IT) wgmma_wait<1>();\n      fence_registers(dp);",
    ),
    "stage freed early": (
        *("keys", KEYS, WAIT_FOR_DK + "      free_stage(stage);\n"),
        "      if (IT) free_stage(stage);\n" + WAIT_FOR_DK + "      if (!IT) free_stage(stage);\n",
    ),
    "results not waited for": (
        *("keys", KEYS, "      wgmma_wait<0>();"),
        "      if (!IT) wgmma_wait<0>();",
    ),
    "no wgmma fence": (
        *("keys", KEYS, "      wgmma_fence();\n      issue_scores"),
        "      if (!IT) wgmma_fence();\n      issue_scores",
    ),
    "too many registers": (
        *("queries", QUERIES, "registers_shrink<Tile::kProducerRegisters>();"),
        "if (IT) registers_shrink<56>();\n    else registers_shrink<Tile::kProducerRegisters>();",
    ),
    "keys not cleared": (
        *("queries", QUERIES, "      clear_rows<Tile::kN, Tile::kWidth>(shared.k"),
        "      if (!IT) clear_rows<Tile::kN, Tile::kWidth>(shared.k",
    ),
    "values not cleared": (
        *("queries", QUERIES, "      clear_rows<Tile::kN, Tile::kWidth>(shared.v"),
        "      if (!IT) clear_rows<Tile::kN, Tile::kWidth>(shared.v",
    ),
    "dP not waited for, by queries": (
        *("queries", QUERIES, "      wgmma_wait<0>();\n      fence_registers(dp);"),
        "      if (!IT) wgmma_wait<0>();\n      fence_registers(dp);",
    ),
    "stage freed early, by queries": (
        *("queries", QUERIES, "      if (last >= 0) free_stage(last);"),
        "      if (IT || last >= 0) free_stage(IT ? stage : last);",
    ),
    "loaded before freed, by queries": (
        *("queries", QUERIES, "ring.parity(Tile::kStages) ^ 1);"),
        "ring.parity(Tile::kStages) ^ 1 ^ IT);",
    ),
}


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    folder = tmp_path_factory.mktemp("attention_backward_faults")
    headers = shutil.copytree(SOURCES, folder / "cuda")
    for name, (_, file, right, wrong) in PLANTED.items():
        text = (headers / file).read_text()
        assert text.count(right) == 1, f"{file} has {text.count(right)} times: {right}"
        (headers / file).write_text(text.replace(right, wrong.replace("IT", f'planted("{name}")')))
    return compiled("attention_backward_fault", headers, folder)


@pytest.mark.parametrize("late", ["w", "lr", "lw"])
def test_sound_without_a_fault(program, late):
    for kernel in ("keys", "queries"):
        assert run(program, late, kernel) == ""


@pytest.mark.parametrize("fault", PLANTED)
def test_a_fault_is_found(program, fault):
    for kernel in PLANTED[fault][0].split():
        assert any(run(program, late, kernel, fault) for late in ("l", "w", "lr")), kernel
