"""Attention's Hopper gradients with a fault are found wrong, or stopped, as forward is in
test_attention_faults.py."""

import re
import shutil

import pytest
from cuda_on_cpu.harness import SOURCES
from cuda_on_cpu.test_attention_faults import compiled, run

pytestmark = pytest.mark.here

BOTH, KEYS, QUERIES, SUMS = (
    f"attention_sm90_backward{of}.cuh" for of in ("", "_keys", "_queries", "_sums")
)
PARTS = "attention_sm90_parts.cuh"
WAIT_FOR_DK = """\
      wgmma_wait<0>();
      fence_registers(dk);
      if constexpr (kHasDk && kHasDv) fence_registers(dv);
      fence_registers(p);
      fence_registers(ds);
"""
# name: (kernels it is in, file, the right text, what stands there instead); IT is its switch.
PLANTED = {
    "transposed operand": (
        *("keys queries", PARTS, "    wgmma<T, kMN>(d, a[step]"),
        "    if (IT) wgmma<T, kK>(d, a[step], operand_k(b, 16 * kSteps, 0, 16 * step), true);\n"
        "    else wgmma<T, kMN>(d, a[step]",
    ),
    "no delta": ("keys", BOTH, "dp[i] - known.x", "dp[i] - (IT ? 0 : known.x)"),
    "mask off by one": (
        *("keys", "attention_tiles.cuh", "keys.offset = -place_of(shape, sequence).offset;"),
        "keys.offset = -place_of(shape, sequence).offset + IT;",
    ),
    "proxy fence missing": (
        *("keys queries", PARTS, "  fence_proxy_async();"),
        "  if (!IT) fence_proxy_async();",
    ),
    "first not cleared": (
        *("keys queries", BOTH, " shared.walked(0, stage),"),
        " shared.walked(IT, stage),",
    ),
    "second not cleared": (
        *("keys queries", BOTH, " shared.walked(1, stage));"),
        " shared.walked(!IT, stage));",
    ),
    "hidden P kept": (
        "keys",
        KEYS,
        "0x0000ffffu : 0xffff0000u",
        "0x0000ffffu : IT ? ~0u : 0xffff0000u",
    ),
    "hidden dS kept": ("keys", KEYS, "      s[i] = 0.f;", "      if (!IT) s[i] = 0.f;"),
    "hidden dS kept, by queries": (
        "queries",
        QUERIES,
        "{ s[i] = 0.f; }",
        "{ if (!IT) s[i] = 0.f; }",
    ),
    "absent queries' delta": (
        *("keys", KEYS, "is_present ? arguments.delta"),
        "IT || is_present ? arguments.delta",
    ),
    "rows not waited for": ("keys", BOTH, "Tile::kFillers,", "Tile::kFillers - IT,"),
    "rows stored early": (
        *("keys", KEYS, "    __syncwarp();  // the stage is empty"),
        "    if (!IT) __syncwarp();  // the stage is empty",
    ),
    "one head for all": (
        "keys",
        KEYS,
        "load_queries(work, head,",
        "load_queries(work, IT ? 0 : head,",
    ),
    "wrong stage": (
        *("keys", KEYS, "issue_own(s, shared, 0, own_row(), stage);"),
        "issue_own(s, shared, 0, own_row(), IT ? 0 : stage);",
    ),
    "keys not waited for": (
        *("keys", KEYS, "    mbarrier_wait(&shared.barriers().own, 0);"),
        "    if (!IT) mbarrier_wait(&shared.barriers().own, 0);",
    ),
    "queries not waited for": (
        *("keys", KEYS, "      shared.barriers().ring.wait_full"),
        "      if (!IT) shared.barriers().ring.wait_full",
    ),
    "loaded before freed": (
        *("keys queries", BOTH, "    barriers.ring.wait_empty"),
        "    if (!IT) barriers.ring.wait_empty",
    ),
    "scores not waited for": (
        *("keys", KEYS, "      wgmma_wait<kHasDk>();"),
        "      if (!IT) wgmma_wait<kHasDk>();",
    ),
    "dP not waited for": (
        *("keys", KEYS, "        wgmma_wait<kHasDv>();"),
        "        if (!IT) wgmma_wait<kHasDv>();",
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
        *("keys", KEYS, "      wgmma_fence();\n      issue_own"),
        "      if (!IT) wgmma_fence();\n      issue_own",
    ),
    "too many registers": (
        *("queries", PARTS, "registers_shrink<Tile::kProducerRegisters>();"),
        "if (IT) registers_shrink<56>();\n    else registers_shrink<Tile::kProducerRegisters>();",
    ),
    "dP not waited for, by queries": (
        *("queries", QUERIES, "      wgmma_wait<0>();\n      fence_registers(dp);"),
        "      if (!IT) wgmma_wait<0>();\n      fence_registers(dp);",
    ),
    "stage freed early, by queries": (
        *("queries", QUERIES, "if (last >= 0) release(&barriers.ring.empty[last]);"),
        "if (IT || last >= 0) release(&barriers.ring.empty[IT ? stage : last]);",
    ),
    "absent keys not cleared": (
        *("keys", KEYS, "Tile::kHasDq && work.seen < Tile::kOwn;"),
        "!IT && Tile::kHasDq && work.seen < Tile::kOwn;",
    ),
    "absent keys not hidden": (
        *("keys", KEYS, "if (own_row() + 64 <="),
        "if (IT || own_row() + 64 <=",
    ),
    "dS not fenced": (
        *("keys", SUMS, "    fence_proxy_async();\n    named"),
        "    if (!IT) fence_proxy_async();\n    named",
    ),
    "dS not shared": (
        *("keys", SUMS, "    named_barrier_sync("),
        "    if (!IT) named_barrier_sync(",
    ),
    "dq not fenced": (
        *("keys", SUMS, "    fence_proxy_async();\n    __syncwarp"),
        "    if (!IT) fence_proxy_async();\n    __syncwarp",
    ),
    "half of dq": ("keys", SUMS, "Own, group * kColumns, k)", "Own, IT ? 0 : group * kColumns, k)"),
    "dq not waited for": (
        *("keys", KEYS, "          wgmma_wait<1>();"),
        "          if (!IT) wgmma_wait<1>();",
    ),
    "dq handed over before the last is read": (
        *("keys", SUMS, "    ring.wait_empty(filled);"),
        "    if (!IT) ring.wait_empty(filled);",
    ),
    "dq added before it is there": (
        *("keys", SUMS, "    ring.wait_full(filled);"),
        "    if (!IT) ring.wait_full(filled);",
    ),
    "dq freed before it is read": (
        *("keys", SUMS, "    bulk_wait_read();"),
        "    if (!IT) bulk_wait_read();",
    ),
    "no turns": ("keys", SUMS, "[number], turn);", "[number], IT ? 0 : turn);"),
    "any order behind the first": (
        *("keys", SUMS, "    wait_turn("),
        '    if (planted("any order behind the first")) turn = smaller(turn, 1);\n    wait_turn(',
    ),
    "passed before complete": (
        *("keys", SUMS, "    bulk_wait();\n    pass_turn(&arguments.turns[number]);"),
        "    if (!IT) bulk_wait();\n    pass_turn(&arguments.turns[number]);\n"
        "    if (IT) bulk_wait();",
    ),
    "turns against the order": (
        *("keys", "attention_tiles.cuh", "return key_tile;"),
        "return IT ? 4 - key_tile : key_tile;",
    ),
    "work by block": (
        "keys",
        KEYS,
        "index = shared.barriers().work;",
        "if (!IT) index = shared.barriers().work;",
    ),
    "counters not zeroed": (
        "keys",
        BOTH,
        "    x.counters[i] = 0;",
        "    if (!IT) x.counters[i] = 0;",
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


@pytest.mark.parametrize(
    "fault, said",
    [
        ("turns against the order", r"deadlock: .* at \S*attention_sm90_backward_sums\.cuh:\d+"),
        ("work by block", r"deadlock: .* at \S*attention_sm90_backward_sums\.cuh:\d+"),
        ("any order behind the first", "bits depend on the order of blocks"),
    ],
)
def test_what_is_said_of_turns(program, fault, said):
    assert any(re.search(said, run(program, late, "keys", fault)) for late in ("", "l"))
