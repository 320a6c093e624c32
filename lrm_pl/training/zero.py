"""A Lightning strategy for DeepSpeed ZeRO on GPUs and CPUs.

Each rank stores a partition of the optimizer state. Stage 2 also partitions the gradients, and stage 3 partitions the
gradients and the weights. As in all strategies, weights are float32, bf16-mixed uses autocast, gradients are reduced in
float32, and inputs such as poses and rays are not cast.

This is the only module that uses DeepSpeed, which is imported on demand.
"""

import contextlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, Literal, TypeVar

import lightning as L
import torch
from lightning.fabric.utilities.types import Steppable
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.plugins.precision import DeepSpeedPrecision, Precision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from torch import Tensor, nn

from lrm_pl.checkpoints.network import network_tensors
from lrm_pl.errors import InputError
from lrm_pl.kernels.device import with_index
from lrm_pl.training.module import LRMModule
from lrm_pl.training.sharded_state import (
    MOMENT_NAMES,
    FlatShard,
    StateAccess,
    StateTensor,
    adam_state,
    full_tensor,
)

#: Supported precisions. Other precisions cast the weights or scale the loss, which the gradient guard does not support.
PRECISIONS = ("32-true", "bf16-mixed")

Data = TypeVar("Data")


class ZeroPrecision(DeepSpeedPrecision):
    """Precision plugin that uses autocast for bf16-mixed and does not cast the batch."""

    def convert_input(self, data: Data) -> Data:
        """Return the batch unchanged. Lightning's implementation would round cameras to bfloat16."""
        return data

    def forward_context(self) -> contextlib.AbstractContextManager[Any]:
        """Return the autocast context. The engine also enters autocast (see ``ZeroStrategy.init_deepspeed``)."""
        if self.precision == "32-true":
            return contextlib.nullcontext()
        from deepspeed.accelerator import get_accelerator

        return torch.autocast(get_accelerator().device_name(), torch.bfloat16)

    def backward(  # type: ignore[override]
        self, tensor: Tensor, model: L.LightningModule, *_: object, **__: object
    ) -> None:
        """Run the backward pass without scaling, because Lightning already scales the loss for accumulation."""
        super().backward(tensor, model, None, scale_wrt_gas=False)

    def optimizer_step(  # type: ignore[override]
        self, optimizer: Steppable, model: L.LightningModule, closure: Callable[[], object], **_: object
    ) -> object:
        """Run one batch. After the last accumulated batch, check and clip the gradient before the optimizer step."""
        closure()
        engine: Any = model.trainer.model
        if engine.is_gradient_accumulation_boundary():
            self._after_closure(model, optimizer)
        return engine.step()


class ZeroStrategy(DeepSpeedStrategy):
    """Strategy for DeepSpeed ZeRO on GPUs, and on CPUs for tests.

    Args:
        stage: Stage of ZeRO. Stage 1 partitions the optimizer state, stage 2 also partitions the gradients, and stage
            3 also partitions the weights.
        process_group_backend: Backend of the process group. If None, NCCL on GPUs and gloo on CPUs.
        timeout_s: Timeout of collectives in seconds.

    Raises:
        InputError: DeepSpeed is not installed.
    """

    def __init__(
        self,
        stage: Literal[1, 2, 3] = 2,
        process_group_backend: str | None = None,
        timeout_s: float = 1800.0,
    ) -> None:
        if importlib.util.find_spec("deepspeed") is None:
            raise InputError(
                "DeepSpeed is not installed, but this strategy requires it",
                remedy="install it with pip install 'lrm_pl[deepspeed]'",
            )
        super().__init__(
            stage=stage,
            process_group_backend=process_group_backend,
            timeout=timedelta(seconds=timeout_s),
            logging_batch_size_per_gpu=1,  # else Lightning reads it from the DataLoader
        )
        self.stage = stage

    @property
    def precision_plugin(self) -> Precision:
        """Precision plugin of the strategy, which is a ``ZeroPrecision`` or the default plugin."""
        return self._precision_plugin or Precision()

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        """Replace Lightning's plugin with a ``ZeroPrecision`` of the same precision.

        Raises:
            InputError: The precision is not supported.
        """
        if plugin is not None and plugin.precision not in PRECISIONS:
            raise InputError(
                expected=f"trainer.precision {' or '.join(PRECISIONS)} with DeepSpeed", found=plugin.precision
            )
        self._precision_plugin = None if plugin is None else ZeroPrecision(plugin.precision)  # type: ignore[arg-type]

    @property
    def root_device(self) -> torch.device:
        """Device of this process. It includes an index, which DeepSpeed requires even on CPUs."""
        return with_index(super().root_device)

    def setup_environment(self) -> None:
        """Initialize the process group. Unlike Lightning's implementation, this supports CPUs."""
        if not isinstance(self.accelerator, CUDAAccelerator):
            import deepspeed
            from deepspeed.accelerator import set_accelerator
            from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

            set_accelerator(CPU_Accelerator())  # otherwise DeepSpeed selects a visible GPU
            # Use gloo, because compiling DeepSpeed's shared-memory collectives takes minutes.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # In every step, DeepSpeed calls functions that PyTorch 2.14 has renamed.
        warnings.filterwarnings(
            "ignore", r"`torch\.distributed\.(all_gather_into|reduce_scatter)_tensor`", FutureWarning
        )
        DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        """Initialize the process group."""
        if isinstance(self.accelerator, CUDAAccelerator):
            super().setup_distributed()
            return
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @contextlib.contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Do nothing, because the engine partitions the existing network."""
        yield

    def init_deepspeed(self) -> None:
        """Create the DeepSpeed engine for training. For evaluation, move the full network to this rank's device."""
        assert isinstance(self.lightning_module, LRMModule)
        trainer = self.lightning_module.trainer
        if not trainer.training:
            self.model_to_device()
            return
        assert isinstance(self.config, dict)
        self.config |= {
            "gradient_clipping": 0.0,  # LRMModule clips
            "bf16": {"enabled": False},  # Lightning enables it for bf16-mixed, which casts the weights
            # Otherwise, the engine disables autocast on GPUs. Weights and gradients are communicated in float32.
            "torch_autocast": {
                "enabled": self.precision_plugin.precision == "bf16-mixed",
                "dtype": "bfloat16",
                "lower_precision_safe_modules": [],
            },
        }
        if self.stage == 3:
            # Rendering uses the weights of the decoder outside of a forward method, so they must not be partitioned.
            largest = max(p.numel() for p in self.lightning_module.lrm.decoder.parameters())
            zero = self.config["zero_optimization"]
            zero["stage3_param_persistence_threshold"] = max(100_000, largest)
        self._initialize_deepspeed_train(self.lightning_module)

    def state_access(self, lrm: nn.Module) -> StateAccess:
        """Return the ``StateAccess`` of this strategy."""
        return ZeroStateAccess(lrm, self.deepspeed_engine.optimizer)

    def on_train_end(self) -> None:
        """Remove the engine and restore the full weights for use after training."""
        assert isinstance(self.lightning_module, LRMModule)
        lrm = self.lightning_module.lrm
        tensors = self.state_access(lrm).network()
        self.deepspeed_engine.destroy()  # removes hooks from the modules
        if self.stage < 3:
            return
        for name, parameter in lrm.named_parameters():
            parameter.data = full_tensor(tensors[f"network.{name}"]).clone()


class ZeroStateAccess(StateAccess):
    """Access to the partitions of a ZeRO optimizer on this rank.

    Stages 1 and 2 flatten and concatenate the parameters of a group and partition the result. Stage 3 partitions each
    parameter separately.

    Args:
        lrm: The network.
        optimizer: The optimizer created by DeepSpeed.
    """

    def __init__(self, lrm: nn.Module, optimizer: Any) -> None:  # noqa: ANN401 - DeepSpeed has no types
        super().__init__(lrm, optimizer)
        self.optimizer: Any = optimizer
        self._full_weights = hasattr(optimizer, "single_partition_of_fp32_groups")  # stages 1 and 2
        if self._full_weights:
            self._groups, self._flats = optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups
        else:
            self._groups, self._flats = optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat

    def network(self) -> dict[str, StateTensor]:
        """Return all weights and buffers in float32 by checkpoint name (``network.*``)."""
        tensors: dict[str, StateTensor] = dict(network_tensors(self.lrm))
        if not self._full_weights:
            parameters: Iterator[tuple[str, Any]] = self.lrm.named_parameters()
            frozen = ((name, p) for name, p in parameters if not p.requires_grad)
            tensors |= {f"network.{name}": self._stage3_shard(p, p.ds_tensor.data) for name, p in frozen}
        return tensors | {f"network.{name}": shard for name, shard in self.trainable().items()}

    def trainable(self) -> dict[str, StateTensor]:
        """Return the trainable weights by parameter name."""
        return {name: self._shard(p, flat) for name, p, flat in self._trainable_parameters()}

    def optimizer_state(self) -> dict[str, StateTensor]:
        """Return the state of AdamW by checkpoint name (``adam.*``). An empty state is initialized first."""
        tensors: dict[str, StateTensor] = {}
        for name, parameter, flat in self._trainable_parameters():
            state = adam_state(self.optimizer.optimizer, flat)
            tensors[f"adam.{name}.step"] = state["step"]
            tensors |= {f"adam.{name}.{m}": self._shard(parameter, state[m]) for m in MOMENT_NAMES}
        return tensors

    def apply_changes(self) -> None:
        """Update the network after in-place changes to the returned tensors. All ranks must call this together."""
        if self._full_weights:
            self.optimizer.update_lp_params()
            return
        self.optimizer.checkpoint_event_prologue()  # releases gathered parameters
        for number in range(len(self._flats)):
            self.optimizer._reassign_or_swap_out_partitioned_parameters(number)
        self.optimizer.checkpoint_event_epilogue()  # gathers the parameters that are never partitioned

    def gradient_norm(self) -> Tensor:
        """Return the 2-norm of the full gradient, a scalar that is equal on all ranks."""
        square = torch.stack([g.float().square().sum() for g in self._gradients()]).sum()
        torch.distributed.all_reduce(square)
        return square.sqrt()

    def clip_or_skip(self, norm: Tensor, limit: float | None, skip: Tensor) -> None:
        """Clip the gradient, or make the engine skip the step.

        To skip a step, the gradient is set to NaN, because DeepSpeed skips steps whose gradient is not finite.
        """
        factor = (limit / (norm + 1e-6)).clamp(max=1.0) if limit else torch.ones_like(norm)
        torch._foreach_mul_(self._gradients(), factor.where(skip == 0, torch.nan))

    def _gradients(self) -> list[Tensor]:
        partitions = self.optimizer.averaged_gradients.values()
        return [gradient for partition in partitions for gradient in partition or ()]

    def _trainable_parameters(self) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
        """Yield each trainable parameter with its name and this rank's flat float32 weights of its group."""
        flats = {id(p): flat for group, flat in zip(self._groups, self._flats, strict=True) for p in group}
        return ((name, p, flats[id(p)]) for name, p in self.lrm.named_parameters() if p.requires_grad)

    def _shard(self, parameter: Any, values: Tensor) -> FlatShard:  # noqa: ANN401 - DeepSpeed's attributes
        """Return the shard of a parameter in ``values``, which has the same layout as the flat weights of the group."""
        values = values.detach()
        if not self._full_weights:
            _, offset, count = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
            return self._stage3_shard(parameter, values.narrow(0, int(offset), int(count)))
        mapping = parameter._hp_mapping
        if mapping is None:
            return FlatShard(values[:0], 0, parameter.shape)
        fragment = mapping.hp_fragment_address
        local = values.narrow(0, fragment.start, fragment.numel)
        return FlatShard(local, mapping.lp_fragment_address.start, parameter.shape)

    def _stage3_shard(self, parameter: Any, local: Tensor) -> FlatShard:  # noqa: ANN401
        """Return a shard without the padding that makes the shards of all ranks equally long."""
        start = torch.distributed.get_rank() * parameter.ds_tensor.ds_numel
        return FlatShard(local[: max(0, parameter.ds_numel - start)], start, parameter.ds_shape)
