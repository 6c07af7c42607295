"""Train as `train.py` does, with candidates for its recipe that it does not have.

    python results/candidates.py --averages 50 200 --ghost-batch 128 --set batchnorm_momentum=0.1 --holdout 5000

Takes the options of `train.py` too, but --checkpoint. The report says which candidates were on, and has the accuracy of
each average of the weights after every epoch beside that of the weights themselves. To rank candidates at a sixth of
the cost, train half the network on half the images and evaluate it on all the others in the end:
`--half-width --holdout 27500 --evaluate-few 5000 --averages 50`.
"""

import argparse
import dataclasses
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
                        help="BatchNorm sees N images of a batch at a time; 0 is all")
    parser.add_argument("--bias-rate", type=train.number(float, "(0, inf)"), default=1.0, metavar="FACTOR",
                        help="the learning rate of biases and of BatchNorm's scales and shifts, as a multiple")
    parser.add_argument("--decay-all", action="store_true",
                        help="biases and BatchNorm's scales and shifts decay as the other weights do")
    parser.add_argument("--central-gradients", action="store_true",
                        help="subtract the mean of each filter's gradient (arXiv:2004.01461)")
    parser.add_argument("--fixed-scales", action="store_true", help="BatchNorm's scales stay 1")
    parser.add_argument("--fixed-whitening", action="store_true", help="the first convolution is not trained")
    parser.add_argument("--whitening-unpadded", action="store_true", help="whiten the patches of unpadded images")
    parser.add_argument("--residual-scale", type=train.number(float, "(0, inf)"), default=1.0, metavar="SCALE",
                        help="where the scales of the last BatchNorm of a residual block begin")
    parser.add_argument("--evaluate-few", type=train.number(int, "[0, inf)"), default=0, metavar="N",
                        help="evaluate on the first N images alone until the last epoch, then on all; 0 is always all")
    parser.add_argument("--half-width", action="store_true",
                        help="not a candidate but a cheaper network to rank them on: half the channels after the first")
    options, rest = parser.parse_known_args(argv)
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


def train_with(options, argv):
    """Run `train.main` with the candidates of `options`. Returns its exit code."""
    start, evaluate, new_report, whiten = train.start, train.evaluate, train.new_report, train.whiten_first_layer
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
            if isinstance(module, train.ResBlock):
                torch.nn.init.constant_(module.residual[1][1].weight, options.residual_scale)
        run.optimizer.register_step_pre_hook(scale_bias_rate)
        if options.decay_all:
            run.optimizer.register_step_pre_hook(decay_all)
        if options.central_gradients:
            run.optimizer.register_step_pre_hook(centralise_gradients)
        averages.update({memory: average(run, memory) for memory in options.averages})
        return run

    def evaluate_averages_too(run):
        if options.evaluate_few and run.epoch + 1 < run.recipe.epochs:  # `epochs` counts an epoch once it is evaluated
            run = dataclasses.replace(run, test=train.Split(*(part[:options.evaluate_few] for part in run.test)))
        accuracies = {memory: evaluate(dataclasses.replace(run, model=model))["test_accuracy"]
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
    with mock.patch.multiple(train, **replaced):
        return train.main(argv)


if __name__ == "__main__":
    train.settle_in()
    sys.exit(train_with(*parse_arguments(sys.argv[1:])))
