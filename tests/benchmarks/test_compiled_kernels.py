"""What is read off compiled kernels, and that those of the paper's sizes use the widest loads."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.compiled_kernels import accesses

ROOT = Path(__file__).parents[2]


def test_accesses_are_counted_by_their_width():
    ptx = """
        @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
        ld.global.L1::evict_last.v2.b32 { %r1, %r2 }, [ %rd1 + 0 ];
        ld.global.nc.b16 %rs1, [%rd2];
        ld.global.b8 %rs1, [%rd2];
        ld.global.b8 %rs1, [%rd2];
        cp.async.cg.shared.global [ %r9 + 0 ], [ %rd3 + 0 ], 0x10, %r4;
        ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%r5];
        st.shared.b32 [%r5], %r1;
        @%p2 st.global.v4.b32 [ %rd1 + 0 ], { %r1, %r2, %r3, %r4 };
        st.global.b16 [ %rd1 + 0 ], { %rs1 };
    """
    assert accesses(ptx, "ld") == {1: 2, 2: 1, 8: 1, 16: 2}
    assert accesses(ptx, "st") == {2: 1, 16: 1}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Of the first case of every folder, in bfloat16."""
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("kernels")
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(folder), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "benchmarks.compiled_kernels", "--first"]
    command += ["--dtype", "bfloat16", "--json", str(folder / "rows.json")]
    done = subprocess.run(
        command, env=env, cwd=ROOT, capture_output=True, check=False, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "rows.json").read_text())


def test_maps_are_read_and_written_16_bytes_at_a_time(rows):
    assert {row["kernel"] for row in rows} == {
        "_focal_kernel",
        "_gradients_kernel",
        "_inject_kernel",
        "apply_kernel",
        "combine_kernel",
        "gradients_kernel",
        "moments_kernel",
        "sums_kernel",
    }
    assert {row["layout"] for row in rows} == {"contiguous", "channels last"}
    for row in rows:
        # the sums of a reduction are few
        if row["kernel"] != "combine_kernel":
            assert "16" in row["loads"], row
        if row["kernel"] not in ("combine_kernel", "moments_kernel", "sums_kernel"):
            assert "16" in row["stores"], row
        assert row["spilled"] == 0, row
        assert row["registers"] < 255, row
        # what a program may hold on the smallest GPUs that run it
        assert row["shared"] <= 99 * 1024, row
