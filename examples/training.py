"""What the training programs have in common: options, methods, the loop, checkpoints, records and curves.

Every method goes through the same loop with the same data in the same order. A run is a function of its options: an
interrupted one goes on from its last checkpoint with the numbers of an uninterrupted one. Under ``torchrun`` every
process takes its part of each batch; with ``--pipeline``, its part of the local modules.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from records import scores
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

import glcan_fx
from glcan_fx import FeatureInfo
from glcan_fx.demo.images import DataError
from glcan_fx.files import replacing, write, write_figure
from glcan_fx.measure import peak_of, timed
from glcan_fx.pytree import map_tensors
from glcan_fx.simulate.estimate import backpropagated, minimised
from glcan_fx.tasks import make_task


class NoCache(glcan_fx.Rules):
    """What an earlier module made is synthesised anew, not read from the cache (the paper's Table 3)."""

    def source(self, tap: FeatureInfo, module: FeatureInfo, state: str) -> str:
        return "own" if state == "own" else "synthesised"


class OneLevel(glcan_fx.Rules):
    """Of a detector's levels, the one whose stride is nearest to the module's own, the finer of two."""

    def levels(self, module: FeatureInfo, levels: Sequence[FeatureInfo]) -> Sequence[int]:
        return [min(range(len(levels)), key=lambda index: abs(levels[index].reduction - module.reduction))]


RULES = {"no-cache": NoCache(), "own-level-twice": glcan_fx.Rules(own_level=2.0), "one-level": OneLevel()}
EXACT = ("bp", "checkpoint")
_MEASURED = range(2, 4)  # steps whose memory is counted, and which are not timed
MIB = 2**20


@dataclass
class Experiment:
    """A task on its data.

    build: makes the plain model; called with the seed set. example: sizes of a batch of inputs, (N, C, H, W). collate:
    of the training data, to (inputs, targets). evaluate: quality of a model on held-out data, larger is better, by
    name; the first is the one that is drawn. optimizer: of parameters and the largest learning rate.
    """

    task: str
    build: Callable[[], nn.Module]
    example: tuple[int, ...]
    train: Dataset[Any]
    evaluate: Callable[[nn.Module, torch.device], dict[str, float]]
    optimizer: Callable[[Any, float], torch.optim.Optimizer]
    collate: Callable[[list[Any]], Any] | None = None


def add_arguments(parser: argparse.ArgumentParser, *, folders: bool = False, **defaults: Any) -> None:
    """Add the options that every program has. folders: data may be in several; defaults: epochs, batch_size, lr."""
    data = parser.add_argument_group("data")
    data.add_argument("--data", type=Path, required=True, metavar="DIR", nargs="+" if folders else None,
                      help="folder of the data set")
    data.add_argument("--limit", type=int, metavar="N", help="train on the first N images only")
    data.add_argument("--workers", type=int, default=0, metavar="N", help="data loader processes (%(default)s)")
    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=float, default=defaults["epochs"], metavar="N",
                          help="training epochs (%(default)s)")
    training.add_argument("--batch-size", type=int, default=defaults["batch_size"], metavar="N",
                          help="images per step (%(default)s)")
    training.add_argument("--lr", type=float, default=defaults["lr"], help="peak learning rate (%(default)s)")
    training.add_argument("--seed", type=int, default=0, help="seed of weights, order and augmentation "
                          "(%(default)s)")
    training.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    training.add_argument("--amp", action="store_true", help="autocast to bfloat16")
    training.add_argument("--threads", type=int, metavar="N", help="CPU threads")
    method = parser.add_argument_group("method")
    method.add_argument("--method", default="glcan", type=_named, metavar="NAME",
                        help=f"bp, checkpoint, {', '.join(sorted(glcan_fx.methods.METHODS))}, or several, each the "
                        "base of the one before: hpff+man+dgl (%(default)s)")
    method.add_argument("-k", "--k", default="fewest", help="number of local modules: a number, fewest, natural, or "
                        "split points separated by commas (%(default)s)")
    method.add_argument("--head", choices=("full", "light", "lean"), help="head of auxiliary networks")
    method.add_argument("--aux-width", type=float, metavar="W", help="width of auxiliary networks, 0 to 1")
    method.add_argument("--aux-depth", type=int, default=0, metavar="N", help="trunk blocks in auxiliary networks "
                        "(%(default)s)")
    method.add_argument("--aux-hidden", type=int, metavar="N", help="hidden layers of a classifier's auxiliary "
                        "networks, before global average pooling")
    method.add_argument("--aux-stride", type=int, metavar="N", help="finest level of a detector's auxiliary "
                        "networks")
    method.add_argument("--aux-lr", type=float, default=1.0, metavar="F",
                        help="learning rate of auxiliary networks, relative (%(default)s)")
    method.add_argument("--ahead", type=int, default=0, metavar="N", help="number of next blocks that a local loss "
                        "passes through, without training them (%(default)s)")
    method.add_argument("--window", type=int, metavar="N", help="number of local modules that a local loss trains")
    method.add_argument("--memory-budget", metavar="6GiB", help="plan for a step that fits in this much memory")
    method.add_argument("--compute-budget", type=float, metavar="1.3", help="compute that a step may take, relative "
                        "to backpropagation")
    method.add_argument("--pipeline", type=int, default=1, metavar="N", help="divide the local modules among N "
                        "processes of torchrun (%(default)s)")
    method.add_argument("--micro-batches", type=int, default=8, metavar="N", help="micro-batches per step of a "
                        "pipeline (%(default)s)")
    method.add_argument("--predictors", choices=("own", "model"), default="own", help="last layer of auxiliary "
                        "networks: their own, or the model's, detached (%(default)s)")
    method.add_argument("--rules", choices=RULES, help="ablation: no feature comes from the cache; a detector's "
                        "own level counts twice; only its nearest level counts")
    output = parser.add_argument_group("output")
    output.add_argument("-o", "--out", type=Path, default=None, metavar="DIR",
                        help="folder of the run (runs/TASK-METHOD-kK-sSEED)")
    kept = output.add_mutually_exclusive_group()
    kept.add_argument("--resume", action="store_true", help="resume from the last checkpoint in --out; more --epochs "
                      "than before extend the run")
    kept.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    output.add_argument("--evaluate-every", type=int, default=1, metavar="N",
                        help="epochs between evaluations (%(default)s)")
    output.add_argument("--cosines", action="store_true", help="with each evaluation, record the cosine between "
                        "every local module's gradient and backpropagation's; needs backpropagation's memory")


@contextmanager
def refusing() -> Iterator[None]:
    """Data that cannot be read end a program with what to do, and without a traceback."""
    try:
        yield
    except DataError as error:
        raise SystemExit(str(error)) from error


def _named(text: str) -> str:
    """A method's name, or several with + between them."""
    known = glcan_fx.methods.METHODS
    wrong = [] if text in EXACT else [name for name in text.split("+") if name not in known]
    if wrong:
        raise argparse.ArgumentTypeError(f"{wrong[0]!r}: choose from {', '.join(EXACT)}, {', '.join(sorted(known))}")
    return text


def method_of(args: argparse.Namespace) -> glcan_fx.methods.Method:
    """The local-learning method that the options describe. Raises PlanError."""
    given = {"head": args.head, "width": args.aux_width, "depth": args.aux_depth or None, "hidden": args.aux_hidden,
             "stride": args.aux_stride, "predictors": args.predictors, "ahead": args.ahead, "window": args.window,
             "rules": RULES[args.rules] if args.rules else None}
    usual = {"predictors": "own", "ahead": 0}
    given = {name: value for name, value in given.items() if value is not None and value != usual.get(name)}
    return glcan_fx.methods.method_of(args.method, **given)


def prepared(
    experiment: Experiment, args: argparse.Namespace, processes: int = 1
) -> tuple[nn.Module, glcan_fx.PlannedModel | None]:
    """The model as the method trains it on its part of a batch, and its plan."""
    torch.manual_seed(args.seed)
    model = experiment.build().to(args.device)
    if torch.device(args.device).type == "cpu" and len(experiment.example) == 4:
        model.to(memory_format=torch.channels_last)
    if args.method == "bp":
        return model, None
    images, *size = experiment.example
    example = torch.empty(images // processes, *size, device="meta")
    named = args.k in ("natural", "fewest", "auto")
    k = int(args.k) if args.k.isdecimal() else args.k if named else [name.strip() for name in args.k.split(",")]
    if args.method == "checkpoint":
        plan = glcan_fx.plan(model, k=1, task=experiment.task, example_inputs=example)
        for path in plan.blocks:
            block = model.get_submodule(path)
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        return model, None
    budgets = {"memory_budget": args.memory_budget, "compute_budget": args.compute_budget}
    options = glcan_fx.Options(optimizer=lambda parameters: experiment.optimizer(
        [{"params": list(parameters), "lr": args.lr}], args.lr))
    local = glcan_fx.transform(model, k=k, task=experiment.task, example_inputs=example, method=method_of(args),
                               options=options, devices=args.pipeline, **budgets)
    return local, local.plan


def cosines(
    task: Any, model: glcan_fx.LocalModel, inputs: Any, targets: Any, autocast: Callable[[], Any] = nullcontext
) -> dict[str, float]:
    """Between the gradients that a local module's own loss and backpropagation give its parameters, by its name."""
    modules = model.parameters_by_module()
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    found: list[dict[str, Tensor]] = []
    for result in (partial(backpropagated, task, model.original, [inputs], targets), partial(model, inputs, targets)):
        model.zero_grad()
        with torch.random.fork_rng():
            with autocast():
                loss = minimised(result())
            loss.backward()
        found.append({name: torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten()
                                       for p in parameters]) for name, parameters in modules.items() if parameters})
        for buffer, value in buffers:
            buffer.copy_(value)
    model.zero_grad()
    own, plain = found[1], found[0]
    return {name: torch.nn.functional.cosine_similarity(own[name], plain[name], 0).item() for name in own}


def joined(args: argparse.Namespace) -> tuple[int, int]:
    """This process's number, and how many there are, as ``torchrun`` says; its device is its own."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if args.pipeline not in (1, processes):
        raise SystemExit(f"--pipeline {args.pipeline}: start so many processes, torchrun --nproc-per-node "
                         f"{args.pipeline} {sys.argv[0]} ...; here {'is' if processes == 1 else 'are'} {processes}")
    if args.pipeline > 1 and (args.method in EXACT or args.cosines):
        what = "--cosines" if args.cosines else f"--method {args.method}"
        raise SystemExit(f"--pipeline {args.pipeline} divides local modules among processes, {what} needs all in one")
    if processes == 1:
        return 0, 1
    if args.pipeline == 1 and args.batch_size % processes:
        raise SystemExit(f"--batch-size {args.batch_size}: not a multiple of {processes} processes, which share it")
    if args.device.startswith("cuda"):
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if args.device.startswith("cuda") else "gloo")
    return dist.get_rank(), processes


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Says whether Ctrl-C was pressed, so that a step can be ended first; a second Ctrl-C stops at once."""
    asked: list[bool] = []

    def ask(*_: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(True)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, before)


def run(experiment: Experiment, args: argparse.Namespace) -> dict[str, Any]:
    """Train, evaluate, and write metrics.jsonl, curves.png, plan.html, checkpoint.pt and record.json to ``args.out``;
    returns the record, of the first process."""
    if args.threads:
        torch.set_num_threads(args.threads)
    training = _Run(experiment, args)
    with torch.random.fork_rng():  # a resumed run has its state by now
        compute = compute_of(experiment, args.method, training.plan)
    training.announce()
    training.model.train()
    with interruptible() as stop, training.bar:
        for inputs, targets in training.batches():
            training.train(*map_tensors((inputs, targets), lambda t: t.to(training.device, non_blocking=True)))
            training.show()
            if training.evaluation_is_due():
                training.evaluate(inputs, targets)
            if stop() and training.state.step < training.steps:
                training.stop()
    if training.processes > 1:
        dist.destroy_process_group()
    return {} if training.rank else training.record(compute)


class _Run:
    """One process of a run: the model and what trains it, from the last checkpoint on where ``--resume`` is given."""

    def __init__(self, experiment: Experiment, args: argparse.Namespace) -> None:
        self.experiment, self.args = experiment, args
        self.rank, self.processes = joined(args)
        self.device = torch.device(args.device)
        self.task = make_task(experiment.task, None)
        self.autocast = partial(torch.autocast, self.device.type, torch.bfloat16, enabled=args.amp)
        cuts = args.method not in EXACT
        if not cuts and args.k != "fewest":
            raise SystemExit(f"--k {args.k}: --method {args.method} has no local modules; remove it")
        identity = _identity(experiment, args) | ({"processes": self.processes} if self.processes > 1 else {})
        named = f"-k{args.k.replace(',', '-')}" if cuts else ""
        out = args.out or Path("runs") / f"{experiment.task}-{args.method}{named}-s{args.seed}"
        before = _before(out, identity, args)  # first: planning takes seconds
        images = len(experiment.train)  # type: ignore[arg-type]
        self.per_epoch = images // args.batch_size
        if self.per_epoch == 0:
            raise SystemExit(f"{images} images are less than a batch of {args.batch_size}: choose a smaller "
                             "--batch-size")
        self.steps = max(1, round(args.epochs * self.per_epoch))
        if cuts:
            self.say(f"{args.method}: planning, which simulates training steps")
        self.model, self.plan, self.pipe = self._prepared()
        out.mkdir(parents=True, exist_ok=True)
        self.state = _State(out, self.model, *self._optimizer(), identity, self.rank, self.pipe)
        self.trained: Any = self.pipe or self.model
        if self.processes > 1:
            if self.pipe is None:
                devices = [self.device] if self.device.type == "cuda" else None
                self.trained = DistributedDataParallel(self.model, devices)
            torch.manual_seed(args.seed + self.rank)
        if before is None:
            self.state.begin()
        else:
            self.state.go_on(before, self.device)
        self.times: list[float] = []

    def _prepared(self) -> tuple[nn.Module, glcan_fx.PlannedModel | None, Any]:
        """The model, its plan, and this process's part of a pipeline."""
        args = self.args
        try:
            model, plan = prepared(self.experiment, args, self.processes // args.pipeline)
            pipe = (glcan_fx.distributed.pipeline(model, micro_batches=args.micro_batches, device=self.device)
                    if args.pipeline > 1 and isinstance(model, glcan_fx.LocalModel) else None)
        except glcan_fx.GlcanFxError as error:
            hint = "\n--k takes a number, natural, fewest, or split points" if "split point" in str(error) else ""
            raise SystemExit(f"{error}{hint}") from error
        return model, plan, pipe

    def _optimizer(self) -> tuple[torch.optim.Optimizer, Any]:
        """The optimizer of this process's parameters, and its schedule."""
        model, lr = self.model, self.args.lr
        groups = (model.parameter_groups(lr, lr * self.args.aux_lr) if isinstance(model, glcan_fx.LocalModel)
                  else [{"params": list(model.parameters()), "lr": lr}])
        own = {id(p) for p in (self.pipe or model).parameters() if p.requires_grad}
        for group in groups:
            group["params"] = [p for p in group["params"] if id(p) in own]
        groups = [group for group in groups if group["params"]]
        optimizer = self.experiment.optimizer(groups, lr)
        rates = [group["lr"] for group in groups]
        return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, self.steps, pct_start=0.2)

    def say(self, text: object) -> None:
        if self.rank == 0:
            print(text, file=sys.stderr)

    def announce(self) -> None:
        """Write the plan, say what is to come, and begin the bar."""
        args, out, plan = self.args, self.state.out, self.plan
        if plan is not None and self.rank == 0:
            plan.save(out / "plan.html")
            plan.save(out / "plan.json")
            self.say(plan.simulated())
            for number, one in enumerate(plan.on_ranks(args.micro_batches) if self.pipe is not None else ()):
                self.say(f"process {number}: local modules {one.modules[0]} to {one.modules[-1]}, "
                         f"{one.peak / MIB:.0f} MiB, {one.share:.0%} of the operations")
        every = f"every {args.evaluate_every} epochs" if args.evaluate_every > 1 else "every epoch"
        self.say(f"{args.method}: {self.steps - self.state.step} of {self.steps} steps to go, an evaluation {every}\n"
                 f"{out}: with each evaluation checkpoint.pt (weights, auxiliary networks, optimizer), metrics.jsonl; "
                 f"then record.json, curves.png{', plan.html' if plan else ''}")
        self.bar = tqdm(
            total=self.steps, initial=self.state.step, desc="training", file=sys.stderr,
            disable=True if self.rank else None, dynamic_ncols=True, bar_format="{desc} {percentage:3.0f}%|{bar}| "
            "{n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]")

    def batches(self) -> Any:
        """Those that are left; of a pipeline the first process reads them for all."""
        first, args = self.state.step, self.args
        if self.pipe is None:
            return _batches(self.experiment, args, first, self.steps, self.rank, self.processes)
        if self.rank == 0:
            return _batches(self.experiment, args, first, self.steps, 0, 1)
        return repeat((None, None), self.steps - first)

    def train(self, inputs: Any, targets: Any) -> None:
        """A step, timed, or its memory counted."""
        state, call = self.state, partial(self._step, inputs, targets)
        if state.step in _MEASURED:
            loss, peak = peak_of(call, (self.pipe or self.model, state.optimizer), self.device)
            state.peak = max(state.peak, peak)
        else:
            loss, seconds = timed(call, self.device)
            self.times.append(seconds)
            state.seconds = statistics.median(self.times[-200:])
        state.schedule.step()
        state.step += 1
        state.losses.append(float(loss))
        if not math.isfinite(state.losses[-1]):
            raise SystemExit(f"the loss is {state.losses[-1]} at step {state.step}: choose a smaller --lr than "
                             f"{self.args.lr:g}")

    def _step(self, inputs: Any, targets: Any) -> Tensor:
        """The loss; of a pipeline, that of this process's local modules."""
        with self.autocast():
            if self.pipe is not None:
                loss = torch.stack(list(self.pipe.step(inputs, targets).losses.values())).sum()
            elif self.plan is not None:
                loss = minimised(self.trained(inputs, targets))
            else:
                loss = minimised(backpropagated(self.task, self.trained, [inputs], targets))
        if self.pipe is None:
            loss.backward()
        self.state.optimizer.step()
        self.state.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def show(self) -> None:
        state = self.state
        rate = self.args.batch_size / state.seconds if state.seconds else 0
        self.bar.set_postfix_str(f"loss {state.losses[-1]:.3f}, {rate:.0f} images/s, {state.peak / MIB:.0f} MiB",
                                 refresh=False)
        self.bar.update()

    def evaluation_is_due(self) -> bool:
        epoch, rest = divmod(self.state.step, self.per_epoch)
        return self.state.step == self.steps or rest == 0 and epoch % self.args.evaluate_every == 0

    def evaluate(self, inputs: Any, targets: Any) -> None:
        """On the held-out data, by the first process, and save. inputs, targets: of the last step, for cosines."""
        state, quality = self.state, {}
        epoch = state.step / self.per_epoch
        if self.pipe is not None:
            self.pipe.gather()
        if self.rank == 0:
            self.bar.set_description_str("evaluating")
            self.model.eval()
            with torch.no_grad():
                quality = self.experiment.evaluate(self.model, self.device)
            self.model.train()
            self.bar.set_description_str("training")
        aligned = {}
        if self.args.cosines and isinstance(self.model, glcan_fx.LocalModel):
            batch = map_tensors((inputs, targets), lambda tensor: tensor.to(self.device))
            aligned = {"cosines": cosines(self.task, self.model, *batch, self.autocast)}
        state.note({"step": state.step, "epoch": epoch, "peak_bytes": state.peak,
                    "loss": statistics.fmean(state.losses[-self.per_epoch:]), "seconds_a_step": state.seconds,
                    **quality, **aligned})
        if self.rank == 0:
            said = ", ".join(f"{name} {value:.4g}" for name, value in quality.items())
            self.bar.write(f"epoch {epoch:g}: {said}", file=sys.stderr)
        state.save()

    def stop(self) -> None:
        """Save, and say how to resume."""
        self.bar.close()
        if self.processes > 1:
            raise KeyboardInterrupt
        self.state.save()
        again = [*sys.argv, *["--resume"] * (not self.args.resume)]
        self.say(f"stopped at step {self.state.step} of {self.steps}, which is saved. Resume with:\n"
                 f"  python {shlex.join(word for word in again if word != '--overwrite')}")
        raise SystemExit(130)

    def record(self, compute: float) -> dict[str, Any]:
        """What the run reached, as it is written."""
        state, out = self.state, self.state.out
        record = {**state.identity, "k": self.plan.k if self.plan else 1, "out": str(out), **state.metrics[-1],
                  "compute": compute}
        write(out / "record.json", json.dumps(record, indent=1) + "\n")
        _curves(out / "curves.png", state.metrics)
        found = ", ".join(f"{name} {record[name]:.4g}" for name in scores(state.metrics[-1]))
        print(f"wrote {out}/record.json: {found}, peak of a step {record['peak_bytes'] / MIB:.0f} MiB, "
              f"{record['seconds_a_step']:.3f} s a step, compute {compute:.2f} of backpropagation's")
        return record


def compute_of(experiment: Experiment, method: str, plan: glcan_fx.Plan | None) -> float:
    """Floating-point operations of a training step, relative to backpropagation's; simulated."""
    if plan is None:
        example = torch.empty(experiment.example, device="meta")
        plan = glcan_fx.plan(experiment.build(), k=1, task=experiment.task, example_inputs=example)
    again = plan.memory.checkpointing if method == "checkpoint" else None
    return (again or plan.memory.plan).flops / plan.memory.backpropagation.flops


_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


class _State:
    """What a run has reached, and where it is kept: by the first of its processes."""

    def __init__(
        self, out: Path, model: nn.Module, optimizer: Any, schedule: Any, identity: Mapping[str, Any], rank: int = 0,
        pipe: Any = None
    ) -> None:
        self.out, self.model, self.optimizer, self.schedule, self.identity = out, model, optimizer, schedule, identity
        self.rank, self.pipe = rank, pipe
        self.step, self.peak, self.seconds = 0, 0, 0.0
        self.losses: list[float] = []
        self.metrics: list[dict[str, Any]] = []

    def begin(self) -> None:
        for name in ("metrics.jsonl", "checkpoint.pt", "record.json") if self.rank == 0 else ():
            (self.out / name).unlink(missing_ok=True)

    def note(self, metrics: dict[str, Any]) -> None:
        self.metrics.append(metrics)
        text = "".join(json.dumps(line) + "\n" for line in self.metrics)  # the whole: a resumed run rewrites its end
        if self.rank == 0:
            write(self.out / "metrics.jsonl", text)

    def save(self) -> None:
        """Write it; each process has random states of its own."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
        own: Any = (torch.get_rng_state(), random.getstate(), np.random.get_state(), cuda)
        states = [own]
        if dist.is_initialized():
            states = [None] * dist.get_world_size()
            dist.all_gather_object(states, own)
        if self.pipe is not None:
            self.pipe.gather()
            dcp.save(self._shared(), checkpoint_id=self._folder(self.step))
        if self.rank == 0:
            self._write(states)
            for old in self.out.glob("optimizer-*") if self.pipe is not None else ():
                if old != self._folder(self.step):
                    shutil.rmtree(old)
        if dist.is_initialized():
            dist.barrier()

    def _folder(self, step: int) -> Path:
        """Where the processes of a pipeline keep their optimizers' states; checkpoint.pt says of which step."""
        return self.out / f"optimizer-{step}"

    def _shared(self) -> dict[str, Any]:
        """The states of the optimizers of a pipeline, by parameters' names."""
        return get_optimizer_state_dict(self.pipe, self.optimizer, options=_FLAT)

    def _write(self, states: list[Any]) -> None:
        content = {"model": self.model.state_dict(),
                   "optimizer": None if self.pipe is not None else self.optimizer.state_dict(),
                   "schedule": self.schedule.state_dict(), "step": self.step, "peak": self.peak, "losses": self.losses,
                   "metrics": self.metrics, "random": states, "identity": dict(self.identity)}
        with replacing(self.out / "checkpoint.pt") as file:
            torch.save(content, file)

    def go_on(self, content: Mapping[str, Any], device: torch.device) -> None:
        self.model.load_state_dict(content["model"])
        if self.pipe is None:
            self.optimizer.load_state_dict(content["optimizer"])
        else:
            found = self._shared()
            dcp.load(found, checkpoint_id=self._folder(content["step"]))
            set_optimizer_state_dict(self.pipe, self.optimizer, found, options=_FLAT)
        reached = ("last_epoch", "_step_count", "_last_lr")  # the rest is of this run, which may be a longer one
        self.schedule.__dict__.update({key: content["schedule"][key] for key in reached})
        self.step, self.peak = content["step"], content["peak"]
        self.losses, self.metrics = content["losses"], content["metrics"]
        state, python, numpy, cuda = content["random"][self.rank]
        torch.set_rng_state(state.cpu())
        random.setstate(python)
        np.random.set_state(numpy)
        if cuda is not None and device.type == "cuda":
            torch.cuda.set_rng_state_all([state.cpu() for state in cuda])


def _before(out: Path, identity: Mapping[str, Any], args: argparse.Namespace) -> dict[str, Any] | None:
    """The checkpoint to go on from; None where a run begins. A folder that holds another run is refused."""
    path = out / "checkpoint.pt"
    if not args.resume:
        if path.exists() and not args.overwrite:
            raise SystemExit(f"{out} holds a run already: resume it with --resume, replace it with --overwrite, or "
                             "choose another --out")
        return None
    if not path.is_file():
        raise SystemExit(f"{path}: there is no checkpoint to resume from; remove --resume")
    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=False)
    own = {key: value for key, value in identity.items() if key != "commit"}
    other = {key: value for key, value in content["identity"].items() if key != "commit"}
    if own["epochs"] > other["epochs"]:
        print(f"extended from {other['epochs']:g} to {own['epochs']:g} epochs: from here on, learning rates are those "
              "of the longer schedule, so the result differs from a run that had it from the start", file=sys.stderr)
        other["epochs"] = own["epochs"]
    if own != other:
        differing = ", ".join(f"{key}: {other.get(key)} then, {own.get(key)} now" for key in own
                              if own[key] != other.get(key))
        raise SystemExit(f"{path} is of a run with other options ({differing}): give the same, or another --out")
    return content


class _Order(Sampler[list[tuple[int, int]]]):
    """Batches of (index, seed of its augmentation), from a step on: a function of seed and step alone. Of several
    processes, each has its part of every batch."""

    def __init__(
        self, images: int, batch: int, seed: int, start: int, stop: int, rank: int = 0, processes: int = 1
    ) -> None:
        self.images, self.batch, self.seed, self.start, self.stop = images, batch, seed, start, stop
        self.rank, self.processes = rank, processes

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        per_epoch = self.images // self.batch
        for step in range(self.start, self.stop):
            epoch, place = divmod(step, per_epoch)
            if place == 0 or step == self.start:
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                order = torch.randperm(self.images, generator=generator)
            chosen = order[place * self.batch:(place + 1) * self.batch].tolist()
            batch = [(index, hash((self.seed, step, number)) % 2**63) for number, index in enumerate(chosen)]
            yield batch[self.rank::self.processes]


class _Seeded(Dataset[Any]):
    """The data set, augmented by the seed that comes with an index."""

    def __init__(self, data: Dataset[Any]) -> None:
        self.data = data

    def __getitem__(self, item: tuple[int, int]) -> Any:
        index, seed = item
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # the CPU's: a rank's GPU draws its own
            return self.data[index]


def _batches(
    experiment: Experiment, args: argparse.Namespace, start: int, stop: int, rank: int, processes: int
) -> DataLoader[Any]:
    order = _Order(len(experiment.train), args.batch_size, args.seed, start, stop, rank, processes)  # type: ignore[arg-type]
    # a generator of its own: the loader draws from the global one otherwise, once a run, resumed or not
    return DataLoader(_Seeded(experiment.train), batch_sampler=order, collate_fn=experiment.collate,
                      num_workers=args.workers, generator=torch.Generator(), pin_memory=args.device.startswith("cuda"))


def _identity(experiment: Experiment, args: argparse.Namespace) -> dict[str, Any]:
    """What a run is a function of."""
    kept = {key: json.loads(json.dumps(value, default=str)) for key, value in vars(args).items()
            if key not in ("out", "resume", "overwrite", "workers", "threads", "evaluate_every", "cosines", "device")}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True,
                            text=True).stdout.strip()
    device = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else platform.machine()
    return {"task": experiment.task, **kept, "k_asked": kept["k"], "device_name": device, "commit": commit,
            "torch": torch.__version__}


def _curves(path: Path, metrics: Sequence[Mapping[str, Any]]) -> None:
    from matplotlib.figure import Figure

    quality = scores(metrics[0])[0]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("loss", quality), strict=True):
        axes.plot([line["epoch"] for line in metrics], [line[name] for line in metrics], marker=".")
        axes.set(xlabel="epoch", ylabel=name)
        axes.grid(alpha=0.3)
    write_figure(path, figure)
