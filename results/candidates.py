"""Train as `train.py` does, with candidates for its recipe that it does not have.

    python results/candidates.py --averages 50 200 --ghost-batch 128 --holdout 5000

Takes the options of `train.py` too, but --checkpoint. The report says which candidates were on, and has the accuracy of
each average of the weights after every epoch beside that of the weights themselves. To rank candidates at a sixth of
the cost, train half the network on half the images and evaluate it on all the others in the end:
`--half-width --holdout 27500 --evaluate-few 5000 --averages 50`.
"""

import argparse
import dataclasses
import functools
import sys
from pathlib import Path
from unittest import mock

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train  # noqa: E402


def parse_arguments(argv):
    """Return the candidates, a namespace, and the arguments that are left for `train.py`."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--averages", type=train.number(int, "[1, inf)"), nargs="+", default=[], metavar="STEPS",
                        help="evaluate averages of the weights that remember so many steps (exponential)")
    parser.add_argument("--ghost-batch", type=train.number(int, "[0, inf)"), default=0, metavar="N",
                        help="BatchNorm sees N images of a batch at a time, each counts as before for its statistics; "
                             "0 is all")
    parser.add_argument("--bias-rate", type=train.number(float, "(0, inf)"), default=1.0, metavar="FACTOR",
                        help="the learning rate of biases and of BatchNorm's scales and shifts, as a multiple")
    parser.add_argument("--decay-all", action="store_true",
                        help="biases and BatchNorm's scales and shifts decay as the other weights do")
    parser.add_argument("--central-gradients", action="store_true",
                        help="subtract the mean of each filter's gradient (arXiv:2004.01461)")
    parser.add_argument("--look-ahead", type=train.number(float, "[0, inf)"), default=0.0, metavar="DISTANCE",
                        help="take gradients that far down Adam's first moment from the weights (arXiv:2401.12033)")
    parser.add_argument("--look-ahead-rate", type=train.number(float, "[0, inf)"), default=0.0, metavar="FACTOR",
                        help="the same, this times the learning rate away")
    parser.add_argument("--ascent", type=train.number(float, "[0, inf)"), default=0.0, metavar="DISTANCE",
                        help="take gradients that far up the gradient from the weights (arXiv:2010.01412)")
    parser.add_argument("--ascent-images", type=train.number(int, "[2, inf)"), default=128, metavar="N",
                        help="of a batch, how many images to ascend the gradient of: each costs as much as in training")
    parser.add_argument("--past-targets", type=train.number(float, "[0, 1)"), default=0.0, metavar="SHARE",
                        help="of the target of each image, how much is what the network said of it an epoch before; "
                             "grows linearly to this in the last epoch (arXiv:2006.12000)")
    parser.add_argument("--both-mirrors", action="store_true",
                        help="an epoch takes half the images twice, once mirrored, in one batch; the next, the others "
                             "(arXiv:2105.13343)")
    parser.add_argument("--spread-crops", action="store_true",
                        help="spread the crops and cutouts of each image evenly over the epochs, as alternating does "
                             "flips, in place of drawing them anew in each")
    parser.add_argument("--fixed-scales", action="store_true", help="BatchNorm's scales stay 1")
    parser.add_argument("--fixed-whitening", action="store_true", help="the first convolution is not trained")
    parser.add_argument("--whitening-unpadded", action="store_true", help="whiten the patches of unpadded images")
    parser.add_argument("--residual-scale", type=train.number(float, "(0, inf)"), default=1.0, metavar="SCALE",
                        help="where the scales of the last BatchNorm of a residual block begin")
    parser.add_argument("--evaluate-few", type=train.number(int, "[0, inf)"), default=0, metavar="N",
                        help="evaluate on the first N images alone until the last epoch, then on all; 0 is always all")
    parser.add_argument("--celu", type=train.number(float, "[0, inf)"), default=0.0, metavar="ALPHA",
                        help="not a candidate, as the network is fixed: CELU in place of ReLU")
    parser.add_argument("--half-width", action="store_true",
                        help="not a candidate but a cheaper network to rank them on: half the channels after the first")
    options, rest = parser.parse_known_args(argv)
    if options.both_mirrors and options.spread_crops:
        parser.error("--both-mirrors and --spread-crops: each makes the batches in its own way")
    if options.ascent and options.past_targets:
        parser.error("--ascent and --past-targets: what is said of a part of a batch is of no use")
    if train.parse_arguments(rest).checkpoint:
        parser.error("--checkpoint: it would not have the averages of the weights")
    return options, rest


OFF = vars(parse_arguments([])[0])  # the candidates of a run that has none


class GhostForward:
    """Lets the BatchNorms of a network see a part of a training batch at a time, a "ghost batch" (arXiv:1705.08741)."""
    ghost_batch: int  # images in a part

    def forward(self, images):
        parts = images.split(self.ghost_batch) if self.training else [images]
        return torch.cat([super(GhostForward, self).forward(part) for part in parts])


def narrow(channels):
    """Return half of `channels`, but all of those of images and of the first block."""
    return channels // 2 if channels > 64 else channels


class NarrowBlock(train.ConvBlock):
    """A ConvBlock of a network of half the width."""

    def __init__(self, c_in, c_out, pool=False):
        super().__init__(narrow(c_in), narrow(c_out), pool)


class NarrowResNet(train.ResNet):
    """A network of half the width, from the second convolution on: 1,665,482 parameters."""

    def __init__(self, *arguments):
        with mock.patch.object(train, "ConvBlock", NarrowBlock):
            super().__init__(*arguments)
        self.head = torch.nn.Linear(narrow(512), 10)


def average(run, memory):
    """Return an exponential average of a run's weights and BatchNorm statistics that remembers `memory` steps.

    It follows the optimizer's steps, and begins anew where the run is put back, as after a sweep.
    """
    averaged = AveragedModel(run.model, multi_avg_fn=get_ema_multi_avg_fn(1 - 1 / memory), use_buffers=True)
    run.optimizer.register_step_post_hook(lambda *_: averaged.update_parameters(run.model))
    run.optimizer.register_load_state_dict_post_hook(lambda *_: averaged.n_averaged.zero_())
    return averaged.module


@torch.no_grad()
def move(parameters, directions, distance):
    """Move all parameters together that far in the directions. Returns (parameter, by how much) of each."""
    norm = torch.stack([direction.norm() for direction in directions]).norm()
    moved = [(parameter, direction * (distance / norm)) for parameter, direction in zip(parameters, directions)]
    for parameter, by in moved:
        parameter += by
    return moved


@torch.no_grad()
def move_back(moved):
    """Take back what `move` did, and forget it."""
    for parameter, by in moved:
        parameter -= by
    moved.clear()


def look_ahead(run, distance, factor):
    """Let a run take its gradients further down the first moment of Adam's gradients from its weights.

    How far is `distance` plus `factor` times the learning rate.
    """
    moved = []  # what `move` returns, between the forward pass and the step

    def move_ahead(*_):
        moments = {parameter: state["exp_avg"] for parameter, state in run.optimizer.state.items()}
        if run.model.training and moments:
            length = distance + factor * run.optimizer.param_groups[0]["lr"]
            moved.extend(move(moments.keys(), moments.values(), -length))

    run.model.register_forward_pre_hook(move_ahead)
    run.optimizer.register_step_pre_hook(lambda *_: move_back(moved))


def ascend(run, batches, distance, count):
    """Yield `batches` of a run, each while its weights are moved up the gradient of the first `count` images.

    They are moved back before the step. BatchNorm's running statistics are of those images, at weights not moved.
    """
    moved = []  # what `move` returns, between here and the step
    momenta = {module: module.momentum for module in run.model.modules() if isinstance(module, torch.nn.BatchNorm2d)}

    def restore(*_):
        move_back(moved)
        for module, momentum in momenta.items():
            module.momentum = momentum

    hook = run.optimizer.register_step_pre_hook(restore)
    parameters = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
    try:
        for images, labels in batches:
            with run.autocast():
                logits = run.model(images[:count])
            loss = train.F.cross_entropy(logits.float(), labels[:count], label_smoothing=run.recipe.label_smoothing)
            moved.extend(move(parameters, torch.autograd.grad(loss, parameters), distance))
            for module in momenta:
                module.momentum = 0.0
            yield images, labels
    finally:
        hook.remove()


class PastTargets:
    """Targets that are in part what the network said of the same image, otherwise augmented, an epoch before."""

    def __init__(self, share, augmented_batches):
        self.last_share = share  # in the last epoch
        self.augmented_batches, self.cross_entropy = augmented_batches, train.F.cross_entropy
        self.said = None  # (N, 10), probabilities of the training images

    def batches(self, recipe, training, seed, epoch):
        """Yield what `augmented_batches` does, and remember which images they are."""
        indices = torch.arange(len(training.labels), device=training.labels.device)
        if epoch == 1:
            self.said = torch.zeros(len(indices), 10, device=indices.device)
        self.share = self.last_share * epoch / recipe.epochs if epoch > 1 else 0.0
        for images, self.chosen in self.augmented_batches(recipe, train.Split(training.images, indices), seed, epoch):
            yield images, training.labels[self.chosen]

    def loss(self, logits, labels, **options):
        """Return the cross-entropy with the labels, in training in part with what was said."""
        loss = self.cross_entropy(logits, labels, **options)
        if not logits.requires_grad:
            return loss
        past = self.said[self.chosen]
        self.said[self.chosen] = logits.detach().softmax(1)
        return (1 - self.share) * loss + self.share * self.cross_entropy(logits, past)


def batches_of_both_mirrors(recipe, training, seed, epoch):
    """Yield as many images as `train.augmented_batches` does, of half the training images, each as it is and mirrored.

    The two of one image are in the same batch, each with a crop and a cutout of its own. The next epoch has the others.
    """
    device, count = training.images.device, len(training.labels)
    halves = torch.randperm(count, generator=train.epoch_generator(seed, 0, device), device=device).chunk(2)
    generator, half = train.epoch_generator(seed, epoch, device), halves[epoch % 2]
    order = half[torch.randperm(len(half), generator=generator, device=device)]
    for chosen in order.split(recipe.batch_size // 2):
        mirrored = torch.arange(2 * len(chosen), device=device) < len(chosen)
        images = train.augment(recipe, training.images[chosen.repeat(2)], mirrored, generator)
        layout = train.memory_format(device.type)
        yield images.contiguous(memory_format=layout), training.labels[chosen.repeat(2)]


def spread_batches(recipe, training, seed, epoch):
    """Yield what `train.augmented_batches` does, crops and cutouts of each image spread evenly over the epochs.

    Each begins anywhere, and goes on by the steps of a sequence of low discrepancy in four dimensions (M. Roberts, The
    Unreasonable Effectiveness of Quasirandom Sequences, 2018).
    """
    device, count = training.images.device, len(training.labels)
    generator = train.epoch_generator(seed, epoch, device)
    mirrored = train.draw_flips(recipe, count, seed, epoch, device, generator)
    starts = torch.rand(4, count, generator=train.epoch_generator(seed, -1, device), device=device)
    steps = 1.16730397826 ** -torch.arange(1.0, 5.0, device=device)  # the positive root of x^5 = x + 1
    size = training.images.shape[-1] - 2 * recipe.padding
    choices = torch.tensor([2 * recipe.padding + 1] * 2 + [size - recipe.cutout + 1] * 2, device=device)
    corners = (choices[:, None] * ((starts + epoch * steps[:, None]) % 1)).long()
    for chosen in torch.randperm(count, generator=generator, device=device).split(recipe.batch_size):
        images = train.crop(training.images[chosen], *corners[:2, chosen], size)
        images = train.cutout(train.flip(images, mirrored[chosen]), *corners[2:, chosen], recipe.cutout)
        yield images.contiguous(memory_format=train.memory_format(device.type)), training.labels[chosen]


def train_with(options, argv):
    """Run `train.main` with the candidates of `options`. Returns its exit code."""
    start, take_steps, evaluate, new_report = train.start, train.take_steps, train.evaluate, train.new_report
    whiten = train.whiten_first_layer
    averages = {}  # of the run that is training, by their memory

    def scale_bias_rate(optimizer, *_):
        optimizer.param_groups[1]["lr"] *= options.bias_rate  # `take_steps` sets it anew for each step

    def decay_all(optimizer, *_):
        optimizer.param_groups[1]["weight_decay"] = optimizer.param_groups[0]["weight_decay"]

    def centralise_gradients(optimizer, *_):
        for parameter in optimizer.param_groups[0]["params"]:  # the weights of the convolutions and the linear layer
            if parameter.grad is not None:
                parameter.grad -= parameter.grad.mean(dim=tuple(range(1, parameter.ndim)), keepdim=True)

    def start_with_candidates(*arguments):
        run = start(*arguments)
        if options.fixed_whitening:
            run.model.prep[0].weight.requires_grad_(False)
        if options.fixed_scales:
            for module in run.model.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.weight.requires_grad_(False)
        for module in run.model.modules():
            if options.ghost_batch and isinstance(module, torch.nn.BatchNorm2d):
                module.momentum *= options.ghost_batch / run.recipe.batch_size  # it sees more batches of fewer images
            if isinstance(module, train.ResBlock):
                torch.nn.init.constant_(module.residual[1][1].weight, options.residual_scale)
        run.optimizer.register_step_pre_hook(scale_bias_rate)
        if options.decay_all:
            run.optimizer.register_step_pre_hook(decay_all)
        if options.central_gradients:
            run.optimizer.register_step_pre_hook(centralise_gradients)
        if options.look_ahead or options.look_ahead_rate:
            look_ahead(run, options.look_ahead, options.look_ahead_rate)
        averages.update({memory: average(run, memory) for memory in options.averages})
        return run

    def evaluate_averages_too(run):
        if options.evaluate_few and run.epoch + 1 < run.recipe.epochs:  # `epochs` counts an epoch once it is evaluated
            run = dataclasses.replace(run, test=train.Split(*(part[:options.evaluate_few] for part in run.test)))
        accuracies = {memory: evaluate(dataclasses.replace(run, averaged=model))["test_accuracy"]
                      for memory, model in averages.items()}
        return {**evaluate(run), "average_accuracy": accuracies}

    def whiten_unpadded(model, images, floor):
        border = (images.shape[-1] - 32) // 2
        whiten(model, images[..., border:32 + border, border:32 + border], floor)

    replaced = {"start": start_with_candidates, "evaluate": evaluate_averages_too,
                "new_report": lambda *arguments: {**new_report(*arguments), "candidates": vars(options)}}
    if options.whitening_unpadded:
        replaced["whiten_first_layer"] = whiten_unpadded
    network = NarrowResNet if options.half_width else train.ResNet
    if options.ghost_batch:
        network = type("GhostResNet", (GhostForward, network), {"ghost_batch": options.ghost_batch})
    replaced["ResNet"] = network
    if options.ascent:
        replaced["take_steps"] = lambda run, batches, schedule: take_steps(
            run, ascend(run, batches, options.ascent, options.ascent_images), schedule)
    if options.both_mirrors:
        replaced["augmented_batches"] = batches_of_both_mirrors
    if options.spread_crops:
        replaced["augmented_batches"] = spread_batches
    relu, cross_entropy = torch.nn.ReLU, train.F.cross_entropy
    if options.celu:
        relu = functools.partial(torch.nn.CELU, options.celu)
    if options.past_targets:
        targets = PastTargets(options.past_targets, replaced.get("augmented_batches", train.augmented_batches))
        replaced["augmented_batches"], cross_entropy = targets.batches, targets.loss
    with (mock.patch.multiple(train, **replaced), mock.patch.object(train.F, "cross_entropy", cross_entropy),
          mock.patch.object(torch.nn, "ReLU", relu)):
        return train.main(argv)


if __name__ == "__main__":
    train.settle_in()
    sys.exit(train_with(*parse_arguments(sys.argv[1:])))
