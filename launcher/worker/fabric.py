"""Measure products, hosts and all-reduces of all ranks: a program for one node.

``python -m launcher.worker.fabric --ranks-per-node R --master-addr A --master-port P`` starts R
ranks on this node; ``--node-rank`` and ``--num-nodes`` say which node it is, under srun Slurm
does. The first rank prints one JSON object.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# Large enough for a link's full rate, small enough for a second over 1 Gb/s Ethernet.
_BUFFER_BYTES = {"cuda": 2**28, "cpu": 2**24}
_GEMM_SIZE = {"cuda": 8192, "cpu": 1024}
_REPETITIONS = 5
# Long enough to import torch on the slowest node, and over before the user wonders.
_MEET_SECONDS = 20.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Be the ranks of this node: the only one, or several that are forked.

    torch is imported once, which takes longer than all else here. It has not looked at a GPU
    when the ranks are forked: each does so by itself.
    """
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--ranks-per-node", type=int, required=True)
    parser.add_argument("--master-addr", required=True)
    parser.add_argument("--master-port", type=int, required=True)
    parser.add_argument("--node-rank", type=int, default=int(os.environ.get("SLURM_NODEID", "0")))
    parser.add_argument(
        "--num-nodes", type=int, default=int(os.environ.get("SLURM_STEP_NUM_NODES", "1"))
    )
    options = parser.parse_args(arguments)
    import torch  # noqa: F401  before the ranks are forked

    if options.ranks_per_node == 1:
        return _run_rank(options, 0)
    ranks = [_fork_rank(options, local_rank) for local_rank in range(options.ranks_per_node)]
    return max(abs(os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1])) for rank in ranks)


def _fork_rank(options: argparse.Namespace, local_rank: int) -> int:
    """Return the process id of a new rank."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        status = _run_rank(options, local_rank)
    except BaseException:  # noqa: BLE001 - a child must not return into its parent's code
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _run_rank(options: argparse.Namespace, local_rank: int) -> int:
    import torch
    import torch.distributed as dist

    from launcher.worker.host_speed import host_autograd_op_seconds

    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if has_gpu else torch.device("cpu")
    if has_gpu:
        torch.cuda.set_device(device)
    per_node, num_nodes = options.ranks_per_node, options.num_nodes
    rank = options.node_rank * per_node + local_rank
    master = f"[{options.master_addr}]" if ":" in options.master_addr else options.master_addr
    dist.init_process_group(
        "nccl" if has_gpu else "gloo",
        init_method=f"tcp://{master}:{options.master_port}",
        rank=rank,
        world_size=num_nodes * per_node,
        timeout=datetime.timedelta(seconds=_MEET_SECONDS),
    )
    own_group = None
    for node in range(num_nodes):
        group = dist.new_group(list(range(node * per_node, (node + 1) * per_node)))
        own_group = group if node == options.node_rank else own_group
    gemm = torch.tensor([_gemm_flops_per_s(device)], device=device)
    slowest = gemm.clone()
    dist.all_reduce(slowest, op=dist.ReduceOp.MIN)
    # All ranks at once, as they train.
    host = host_autograd_op_seconds(device)
    slowest_host = torch.tensor([host or 0.0], device=device)
    dist.all_reduce(slowest_host, op=dist.ReduceOp.MAX)
    intra = _all_reduce_bits_per_s(device, own_group) if per_node > 1 else None
    dist.barrier()
    inter = _all_reduce_bits_per_s(device, None) if num_nodes > 1 else None
    if rank == 0:
        print(  # noqa: T201  read by the launcher
            json.dumps(
                {
                    "gemm_tflop_per_s": float(slowest.item()) / 1e12,
                    "intra_node_all_reduce_gbit_per_s": intra and intra / 1e9,
                    "inter_node_all_reduce_gbit_per_s": inter and inter / 1e9,
                    "host_autograd_op_microseconds": host and float(slowest_host.item()) * 1e6,
                }
            ),
            flush=True,
        )
    dist.barrier()
    dist.destroy_process_group()
    return 0


def _gemm_flops_per_s(device: torch.device) -> float:
    """Return the rate of square matrix products, in bf16 on a GPU and fp32 on a processor."""
    import torch

    size = _GEMM_SIZE[device.type]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    square = torch.randn(size, size, device=device, dtype=dtype)
    seconds = _best_seconds(lambda: square @ square, device)
    return 2 * size**3 / seconds


def _all_reduce_bits_per_s(device: torch.device, group: Any) -> float:
    """Return the bus bandwidth of an all-reduce: what the slowest link carries one way.

    Source: nccl-tests ``doc/PERFORMANCE.md``: size / time x 2 (n - 1) / n.
    """
    import torch
    import torch.distributed as dist

    num_bytes, num_ranks = _BUFFER_BYTES[device.type], dist.get_world_size(group)
    buffer = torch.zeros(num_bytes // 4, device=device)
    seconds = _best_seconds(lambda: dist.all_reduce(buffer, group=group), device)
    return num_bytes * 8 / seconds * 2 * (num_ranks - 1) / num_ranks


def _best_seconds(action: Any, device: torch.device) -> float:
    """Return the shortest time of several, after a first one that is not counted."""
    import torch

    times = []
    for _ in range(_REPETITIONS + 1):
        started = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times[1:])


if __name__ == "__main__":
    sys.exit(main())
