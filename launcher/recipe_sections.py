"""The keys of a recipe: its sections, their types and defaults."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from launcher.strategy import Attention, Checkpointing, Loss, Method, Offload, Optimizer, Precision


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """Which model: a catalogue name, a local folder, or a Hugging Face hub id."""

    name_or_path: str = "???"
    revision: str | None = None
    precision: Precision | None = None
    """``None``: bf16 where the GPU has it, else fp16; fp32 on CPU."""
    max_position_embeddings: int | None = None
    """Tokens; raises the model's own limit, for models whose position encoding stretches."""
    trust_remote_code: bool = False
    random_weights: bool = False
    """Start from random weights of the model's shape: for benchmarks, never for results."""


DATA_COLUMNS = (
    "messages", "role", "content", "tools", "conversations", "from", "value", "system",
    "instruction", "input", "output", "history", "prompt", "completion", "text",
)  # fmt: skip
"""Our names of columns, which ``columns`` maps to those of a file."""
RecordFormat = Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text"]


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """One of several sources of training data: a file, a folder of files, or a hub id."""

    path: str = "???"
    format: RecordFormat = "auto"
    columns: dict[str, str] = field(default_factory=dict)
    subset: str | None = None
    split: str = "train"
    weight: float = 1.0
    """How often each record counts in an epoch; with 0.5 every second one does."""
    max_samples: int | None = None


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """What to train on; ``format`` is detected from the first record when ``auto``."""

    path: str | None = None
    """A file, a folder of files, or a hub id; ``sources`` in its place names several."""
    sources: tuple[DataSource, ...] = ()
    eval_path: str | None = None
    format: RecordFormat = "auto"
    columns: dict[str, str] = field(default_factory=dict)
    """The file's name of each column of the format, where it has another: prompt: question."""
    subset: str | None = None
    """Of a hub data set or a folder that describes itself: its configuration."""
    split: str = "train"
    eval_split: str = "test"
    """Splits that ``path`` and ``eval_path`` mean where they are no files."""
    chat_template: str | None = None
    """A file or a known name; ``None`` takes the tokenizer's own."""
    packing: bool = False
    """Fill sequences of ``max_seq_len`` with several examples, which do not see each other."""
    train_on_prompt: bool = False
    max_train_samples: int | None = None
    max_eval_samples: int | None = None

    @property
    def has_training_data(self) -> bool:
        """Whether any is named."""
        return bool(self.path) or bool(self.sources)


@dataclass(frozen=True, kw_only=True)
class OptimSection:
    """The optimisation, in Hugging Face's names; batch size counts samples of all GPUs."""

    global_batch_size: int = 8
    learning_rate: float = 2e-4
    num_train_epochs: float = 1.0
    max_steps: int | None = None
    lr_scheduler_type: Literal[
        "linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"
    ] = "linear"
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.99
    max_grad_norm: float = 1.0
    seed: int = 42
    logging_steps: int = 1
    eval_steps: int | None = None
    save_steps: int | None = None
    save_total_limit: int | None = 2


@dataclass(frozen=True, kw_only=True)
class LoraSection:
    """LoRA adapters, in PEFT's names; read by the methods lora and qlora."""

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ("all-linear",)
    use_rslora: bool = False
    use_dora: bool = False


@dataclass(frozen=True, kw_only=True)
class QuantizationSection:
    """How bitsandbytes stores the frozen weights; read by the method qlora."""

    kind: Literal["nf4", "int8"] = "nf4"
    double_quant: bool = True


@dataclass(frozen=True, kw_only=True)
class ClusterSection:
    """Where to run; what is left out is probed on this machine."""

    gpu: str | None = None
    num_nodes: int | None = None
    gpus_per_node: int | None = None
    host_memory_gib: float | None = None
    inter_node_gbit_per_s: float | None = None
    measured: str | None = None
    """A file with the rates that ``zerofit doctor --json`` measured between the nodes."""
    price_per_gpu_hour: float | None = None
    """In any currency; a plan then says what the run costs."""
    hostfile: str | None = None
    include: str | None = None
    """Hosts of the hostfile to use, as DeepSpeed writes them: ``node1@node[3-4]:0,2``."""
    exclude: str | None = None
    backend: Literal["auto", "local", "deepspeed", "slurm"] = "auto"
    launcher: Literal["pdsh", "openmpi", "mpich", "slurm", "impi", "mvapich"] = "pdsh"
    """DeepSpeed's launcher on a hostfile's hosts; some are refused, with the reason."""
    pass_env: tuple[str, ...] = ()
    """Variables that other hosts get beside the usual ones; ``NAME_*`` is a prefix."""


@dataclass(frozen=True, kw_only=True)
class StrategySection:
    """Memory savings; every field that is left out is chosen by the planner.

    A recipe may give a list for one of :data:`SEARCHED`: the values to choose among.
    """

    zero_stage: Literal[0, 1, 2, 3] | None = None
    offload_optimizer: Offload | None = None
    offload_param: Offload | None = None
    gradient_checkpointing: Checkpointing | None = None
    attention: Attention | None = None
    loss: Loss | None = None
    optimizer: Optimizer | None = None
    micro_batch_size_per_gpu: int | None = None
    sequence_parallel_size: int | None = None
    """Ranks that share each sequence (Ulysses), for long ones; it divides the number of ranks."""
    grad_accum_dtype: Precision | None = None
    liger_kernels: bool | None = None
    expandable_segments: bool | None = None
    """Mode of torch's CUDA allocator in which blocks can grow; ``None``: on."""
    nvme_path: str | None = None
    allowed: dict[str, Any] = field(default_factory=dict)
    """The lists: values by key, in the recipe's order. A recovery sets a key beside its list."""

    def choices(self, key: str, otherwise: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the values that the planner may take for a key; ``otherwise`` when it is open."""
        value = getattr(self, key)
        return tuple(self.allowed.get(key, otherwise)) if value is None else (value,)

    def permits(self, key: str, value: object) -> bool:
        """Return whether the planner may take a value."""
        return value in self.choices(key, (value,))

    def given(self) -> dict[str, Any]:
        """Return what is set, a value or several, by key."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        del values["allowed"]
        return self.allowed | {key: value for key, value in values.items() if value is not None}

    def without(self, *keys: str) -> StrategySection:
        """Return the section with these keys left to the planner."""
        kept = {key: values for key, values in self.allowed.items() if key not in keys}
        return replace(self, allowed=kept, **dict.fromkeys(keys))


SEARCHED = (
    "zero_stage", "offload_optimizer", "offload_param", "gradient_checkpointing", "attention",
    "loss", "optimizer", "micro_batch_size_per_gpu", "sequence_parallel_size", "liger_kernels",
)  # fmt: skip
"""Keys of ``strategy`` that may hold a list of allowed values."""
TRACKERS = ("tensorboard", "wandb", "mlflow")


@dataclass(frozen=True, kw_only=True)
class TrackingSection:
    """Experiment trackers beside ``trainer_log.jsonl``; offline unless their own variables say."""

    report_to: tuple[str, ...] = ()
    """Any of ``tensorboard``, ``wandb``, ``mlflow``."""
    project: str = "zerofit"
    run_name: str | None = None
    """``None``: the name of the run directory."""
    sample_answer: bool | None = None
    """Answer one held-out prompt before and after; ``None``: not under ZeRO-3, with shared
    sequences, nor in a sweep."""
    metrics_port: int | None = None
    """Each node serves Prometheus metrics at this port while it trains; 0 takes a free one."""
    metrics_address: str = "127.0.0.1"
    """Where it listens; ``0.0.0.0`` lets other hosts in, without a password."""
    memory_snapshot_step: int | None = None
    """Each rank records this step's allocations (1 is the first) for torch's memory_viz."""


@dataclass(frozen=True, kw_only=True)
class RecoverySection:
    """What happens when a run does not go on; docs/reliability.md: which failure leads to what."""

    max_attempts: int = 5
    """Starts of the run in all, the first one included; 1 never starts it again."""
    oom: Literal["ladder", "within_recipe", "stop"] = "ladder"
    """When memory runs out: go on with a more frugal plan, even where that changes strategy keys
    that the recipe sets; only with one that leaves those as they are; or stop."""
    chosen: tuple[str, ...] = ()
    """Written by a recovery: keys of ``strategy`` that it has set, and may set again."""
    watchdog_seconds: float | None = None
    """A rank that takes longer over a micro-step hangs; ``None``: ten predicted step times,
    100 s at least; 0 waits for ever."""
    phase_seconds: float | None = None
    """The same for load, init, the first step, eval and save; ``None``: half an hour."""
    min_nodes: int | None = None
    """A run that loses hosts, of its hostfile or its Slurm job, goes on with the rest, if so many
    are left; ``None``: only while spare hosts of the hostfile take their places."""
    save_grace_seconds: float | None = None
    """How long ranks that were told to stop may take to save; ``None``: four times the predicted
    time of the step and the checkpoint, a minute at least."""
    on_nan: Literal["stop", "skip"] = "stop"
    """Losses or gradients that are not finite end the run, or their step is left out."""


@dataclass(frozen=True, kw_only=True)
class SlurmSection:
    """What the Slurm script asks for; a site file may set the same keys for all recipes.

    ``None`` and an empty list mean "not said": the site file's value, else Slurm's own.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str | None = None
    """Limit in Slurm's notation; by default suggested from the predicted run time."""
    constraint: str | None = None
    gres: str | None = None
    """GPUs by ``--gres`` (gpu, gpu:a100, gpu:a100:8); else by ``--gpus-per-node``."""
    mem: str | None = None
    """Host memory of a node: 200G, or 0 for all of it."""
    cpus_per_task: int | None = None
    exclusive: bool | None = None
    job_name: str | None = None
    modules: tuple[str, ...] = ()
    """Environment modules to load before the ranks start."""
    container: str | None = None
    """Image that the ranks run in; zerofit must be installed in it."""
    container_runtime: Literal["pyxis", "apptainer"] | None = None
    container_mounts: tuple[str, ...] = ()
    """``source:target``; the run directory is always mounted."""
    python: str | None = None
    """Interpreter on the nodes; by default this one, in a container ``python3``."""
    requeue: bool | None = None
    """Whether Slurm may start the job again after a time limit or a lost node; by default yes."""
    signal_seconds: int | None = None
    """How long before the time limit the ranks are told to save and stop."""
    preflight: bool | None = None
    """Whether the job looks at its nodes before the ranks start; by default yes."""
    spare_nodes: int | None = None
    """Nodes to ask for beyond those of the plan, in place of any that the look finds bad."""
    extra: tuple[str, ...] = ()
    """Further options of sbatch, such as ``--mail-type=END``, one each."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One run: model, method, data and limits; ``None`` anywhere means "not decided"."""

    model: ModelSection = field(default_factory=ModelSection)
    method: Method = Method.lora
    max_seq_len: int = 2048
    data: DataSection = field(default_factory=DataSection)
    optim: OptimSection = field(default_factory=OptimSection)
    lora: LoraSection = field(default_factory=LoraSection)
    quantization: QuantizationSection = field(default_factory=QuantizationSection)
    cluster: ClusterSection = field(default_factory=ClusterSection)
    strategy: StrategySection = field(default_factory=StrategySection)
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """Raw DeepSpeed keys; the generated config and the prediction both follow them."""
    tracking: TrackingSection = field(default_factory=TrackingSection)
    recovery: RecoverySection = field(default_factory=RecoverySection)
    slurm: SlurmSection = field(default_factory=SlurmSection)
    output_dir: str | None = None
