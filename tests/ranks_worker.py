"""What each rank of `test_ranks.py` runs: `python -m tests.ranks_worker FOLDER`, with torchrun's variables set."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from tests import tiny
from zbench.models import families
from zbench.models.adapter import MaskAdapter, random_adapter
from zbench.models.loading import LoadedModel
from zbench.models.model import build
from zbench.models.rows import Rows
from zbench.models.shard import Shard
from zbench.models.team import ALONE, Team

# kv heads that 2 and 3 ranks share out unevenly, each hold one of, or all hold the same of.
CASES = [("smollm", 3), ("llama3", 3), ("qwen2", 1), ("qwen3", 3), ("mistral", 6), ("zaya", 3), ("zaya", 6)]


def logits(family: str, kv_heads: int, team: Team) -> torch.Tensor:
    """Of a ragged prefill, a tree behind it, masks with an adapter where there is one, and the head on a capture."""
    config_type, model_type, extra = tiny.FAMILIES[family]
    torch.manual_seed(7)
    shape = {**tiny.SHAPE, "num_key_value_heads": kv_heads, **extra}
    hf = tiny.widened(model_type(config_type(**shape, attn_implementation="eager")))
    config = families.from_hf(hf.config.to_dict())
    loaded = LoadedModel("tiny", None, config, hf.state_dict(), "", None, "")
    model = build(loaded, torch.float32, torch.device("cpu"), "eager", team)
    adapter = None
    if family != "zaya":
        adapter = MaskAdapter(random_adapter(config, rank=4), config, model.dtype, model.device, team.shard)
    ids = torch.randint(0, 300, (2, 9), generator=torch.Generator().manual_seed(1))
    cache = model.new_cache(2, 40)
    found = [model.forward(Rows.chain(ids, cache.lengths), cache).logits]
    cache.extend([9, 6])
    parents = torch.tensor([[-1, 0, 0, 1, 1]]).expand(2, -1)
    tree = Rows.tree(ids[:, :5], cache.lengths, parents)
    out = model.forward(tree, cache, capture=(config.layers,))
    found += [out.logits, model.logits(out.hidden[config.layers])]
    cache.commit(torch.tensor([[0, 1, 4], [0, 2, -1]]), [3, 2])
    if adapter is not None:
        block = Rows.draft_and_verify(ids[:, :3], cache.lengths, 3, (1, 3), 5)
        found.append(model.forward(block, cache, adapter=adapter).logits)
    return torch.cat(found, 1)


def main(folder: Path) -> None:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    team = Team(Shard(rank, size), dist.group.WORLD)
    found = {f"{family}-{kv}": logits(family, kv, team) for family, kv in CASES}
    save_file(found, folder / f"rank{rank}-of-{size}.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    assert ALONE.size == 1
    main(Path(sys.argv[1]))
