"""A language model that no single device holds, trained with the hardware in the loop: torchrun, FSDP2, tensor parallelism,
checkpoints in parts.

    torchrun --nproc-per-node 2 train.py                       a small model of random weights, on a CPU too
    torchrun --nproc-per-node 8 train.py --model meta-llama/Llama-3.1-8B --text my.txt --length 4096 --steps 1000
    torchrun --nproc-per-node 8 train.py ... --replicas 2      hybrid: two copies, each sharded over four ranks
    torchrun --nproc-per-node 8 train.py ... --tp 2            each layer shared by two ranks, and sharded over four such pairs

The same command goes on from the last checkpoint in --out, on as many ranks as there are then. What is trained is the recipe of
Analog Foundation Models (arXiv 2505.09663): learned input ranges, 8-bit converters, weight noise and clip.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import parallelize_module
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from triton_analog.config import TorchInferenceRPUConfig, WeightClipType, WeightNoiseInjectionType
from triton_analog.convert import convert_to_analog
from triton_analog.distributed import AnalogColwise, AnalogRowwise, set_parallel
from triton_analog.optim import AnalogOptimizer, parameter_groups

SMALL = LlamaConfig(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=False,
)  # fmt: skip


def recipe(start_up: int, tile: int) -> TorchInferenceRPUConfig:
    """``start_up``: batches that the input ranges learn from before the gradient moves them; ``tile``: inputs of a tile."""
    config = TorchInferenceRPUConfig()
    config.mapping.max_input_size = tile
    config.forward.inp_res = config.forward.out_res = 2**8 - 2
    config.forward.out_bound = 14.0
    config.modifier.noise_type, config.modifier.std_dev = WeightNoiseInjectionType.ADD_NORMAL_PER_CHANNEL, 0.03
    config.clip.type, config.clip.sigma = WeightClipType.LAYER_GAUSSIAN_PER_CHANNEL, 2.5
    ranges = config.pre_post.input_range
    ranges.enable, ranges.init_from_data, ranges.init_std_alpha = True, start_up, 18.0
    ranges.decay = 0.01
    return config


def split(block: Any, mesh: Any) -> None:
    """Let the ranks of ``mesh`` share the matrices of a block: heads and hidden features, then the slices behind them."""
    columns = [f"self_attn.{name}_proj" for name in "qkv"] + ["mlp.gate_proj", "mlp.up_proj"]
    rows = ["self_attn.o_proj", "mlp.down_proj"]
    plan = {name: AnalogColwise() for name in columns} | {name: AnalogRowwise() for name in rows}
    parallelize_module(block, mesh, plan)


def build(config: Any, start_up: int, tile: int, mesh: Any, tp: Any, compiled: bool) -> Any:
    """The sharded model, in the order that it takes: convert, tensor parallelism, compile, shard; then give it memory."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model = convert_to_analog(model, recipe(start_up, tile), exclude_modules=["lm_head"], inplace=True)
    if tp.size() > 1:
        for block in model.model.layers:
            split(block, tp)
    set_parallel(model, statistics=mesh, tp=tp)  # all ranks of the mesh see other data
    policy = (
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        if mesh.device_type == "cuda"
        else None
    )
    options = {"mesh": mesh, **({} if policy is None else {"mp_policy": policy})}
    for block in model.model.layers:
        if compiled:
            block.compile()
        fully_shard(block, **options)
    fully_shard(model, **options)
    model.to_empty(device=mesh.device_type)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(mesh.device_type)  # buffers that no file has
    return model


def load_digital(model: Any, name: str | None, config: Any) -> None:
    """The weights of the digital model: of a folder or a name on the Hub, or random ones. One rank reads them for all."""
    state: dict[str, Tensor] = {}
    if dist.get_rank() == 0:
        torch.manual_seed(0)
        digital = (
            AutoModelForCausalLM.from_config(config) if name is None else AutoModelForCausalLM.from_pretrained(name)
        )
        state = digital.float().state_dict()
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    set_model_state_dict(model, state, options=options)


def tokens_of(name: str | None, text: str) -> Tensor:
    if name is None:
        return torch.tensor(list(text.encode()))
    return AutoTokenizer.from_pretrained(name)(text, return_tensors="pt").input_ids[0]


def latest(folder: Path) -> tuple[int, Path | None]:
    """The last checkpoint that is whole, and its number of steps."""
    found = {int(path.name): path for path in folder.glob("[0-9]*") if (path / ".metadata").exists()}
    return (max(found), found[max(found)]) if found else (0, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder, or name on the Hub (default: a small model of random weights)")
    parser.add_argument("--text", type=Path, default=Path(__file__).parents[2] / "README.md")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--start-up", type=int, default=4, help="batches that input ranges learn from (the paper: 500)")
    parser.add_argument("--length", type=int, default=64, help="tokens of a block")
    parser.add_argument("--batch", type=int, default=4, help="blocks of a rank (of those that share layers) in a step")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--save-every", type=int, default=10, help="steps")
    parser.add_argument("--replicas", type=int, default=1, help="copies of the model")
    parser.add_argument("--tp", type=int, default=1, help="ranks that share each layer (tensor parallelism)")
    parser.add_argument("--tile", type=int, help="inputs of a tile (default: 512; 32 for the small model)")
    parser.add_argument("--compile", action="store_true", help="compile each block")
    parser.add_argument("--out", type=Path, default=Path("out/large_model"))
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    shape = (options.replicas, ranks // options.replicas // options.tp, options.tp)
    whole_mesh = init_device_mesh(device, shape, mesh_dim_names=("replicate", "shard", "tp"))
    mesh = whole_mesh["shard"] if options.replicas == 1 else whole_mesh["replicate", "shard"]
    readers, reader = (
        ranks // options.tp,
        rank // options.tp,
    )  # ranks that see other data, and which of them this one is

    config = SMALL if options.model is None else AutoConfig.from_pretrained(options.model)
    tile = options.tile or (32 if options.model is None else 512)
    model = build(config, options.start_up, tile, mesh, whole_mesh["tp"], options.compile)
    optimizer = AnalogOptimizer(
        torch.optim.AdamW, model.analog_layers, parameter_groups(model, weight_decay=0.01), lr=options.learning_rate
    )
    start, checkpoint = latest(options.out)
    if checkpoint is None:
        load_digital(model, options.model, config)
    else:
        own, steps_of = get_state_dict(model, optimizer)
        state = {"model": own, "optimizer": steps_of}
        dcp.load(state, checkpoint_id=checkpoint)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])

    blocks = tokens_of(options.model, options.text.read_text("utf-8"))
    blocks = blocks[: len(blocks) // options.length * options.length].view(-1, options.length)
    model.train()
    for step in range(start, options.steps):
        # Other data and other noise for each reader, and the same again after a resume.
        torch.manual_seed(step * readers + reader)
        batch = blocks[torch.randint(len(blocks), (options.batch,))].to(device)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        if rank == 0:
            print(f"step {step + 1}: loss {mean.item() / ranks:.4f}", flush=True)
        if (step + 1) % options.save_every == 0 or step + 1 == options.steps:
            own, steps_of = get_state_dict(model, optimizer)
            dcp.save({"model": own, "optimizer": steps_of}, checkpoint_id=options.out / str(step + 1))

    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:  # for restore_analog(digital_model, torch.load(...)): evaluation, chips and exports on one device
        torch.save(whole, options.out / "model.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
