"""What the real Nanotron computes from a checkpoint's weights, in a process of its own or in several under torchrun.

python -m tests.engine.logits OUT '{"key": ["RUN", "CHECKPOINT"], …}' writes to OUT, by key, the fp32 logits of `IDS`
after training's own start with `init_method.path`; with as many tensor-parallel ranks as there are processes.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

IDS = torch.randint(0, 512, (2, 32), generator=torch.Generator().manual_seed(0))


def logits(run_folder: str, checkpoint: str, config: Path) -> torch.Tensor:
    """Of `IDS`: (2, 32, vocabulary), on every rank."""
    from recipes.engine.checkpoint import Topology
    from recipes.engine.config import nanotron_config, write_config
    from recipes.engine.trainer import StageTrainer
    from recipes.run import Run

    run = Run.load(Path(run_folder))
    stage, topology = run.plan.stages[0], Topology(1, int(os.environ["WORLD_SIZE"]), 1, 0)
    write_config(config, nanotron_config(run.recipe, stage, topology, config.parent, weights=Path(checkpoint)))
    trainer = StageTrainer(run, stage, config, lambda: False)
    with torch.no_grad():
        mask = torch.ones_like(IDS, dtype=torch.bool)
        mine = trainer.unwrapped_model.model(input_ids=IDS, input_mask=mask).transpose(0, 1).contiguous()
    group = trainer.parallel_context.tp_pg
    parts = [torch.empty_like(mine) for _ in range(group.size())]
    torch.distributed.all_gather(parts, mine, group=group)
    return torch.cat(parts, -1)


def main() -> None:
    """Reads the command line."""
    from recipes.train import become_single_process

    become_single_process()
    out, jobs = Path(sys.argv[1]), json.loads(sys.argv[2])
    rank = int(os.environ["RANK"])
    found = {key: logits(*job, out.with_name(f"{out.name}.{key}.{rank}.yaml")) for key, job in jobs.items()}
    if rank == 0:
        torch.save(found, out)
    torch.distributed.barrier()


if __name__ == "__main__":
    main()
