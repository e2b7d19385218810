"""`--init`: the weights that a target network starts from, instead of fresh ones."""

from pathlib import Path

from torch import nn

from ktransfer import networks
from ktransfer.errors import UsageError
from ktransfer.networks import own_modules, published, teachers
from ktransfer.networks.checkpoints import CLASSIFIERS
from ktransfer.networks.descriptors import MODULES
from ktransfer.networks.teachers import Teacher
from ktransfer.networks.zoos import TIMM, TORCHVISION
from ktransfer.progress import say

from .config import RetrainConfig


def find_initial(config: RetrainConfig) -> Teacher | None:
    """The network whose weights are meant, not yet read; None for fresh ones.

    Raises:
        UsageError: there is none such, it has no weights, or it is another network than the one to be trained.
    """
    given = config.init
    if not given:
        return None
    if Path(given).is_dir():
        given = str(Path(given) / "retrain" / "model.safetensors")
    ours = given.endswith(teachers.SAFETENSORS)
    if own_modules.is_own(config.arch) and not ours:
        raise UsageError(
            f"--init {config.init}: only a run or a model.safetensors is read into {config.arch}; load other weights "
            "in the function itself"
        )
    says = ours or given.startswith(TORCHVISION) or given in (*MODULES, *published.NAMES)
    if given.startswith(TIMM):
        raise UsageError(
            f"--init {given}: a name of timm comes without weights; give a checkpoint, or {published.NAMES[0]}"
        )
    try:
        found = teachers.find(given, None if says else config.arch, None, 0)
    except UsageError as error:
        raise UsageError(str(error).replace("--teacher", "--init")) from error
    theirs = (found.network.arch.removeprefix(TORCHVISION), found.network.width)
    if found.weights is None or theirs != (config.arch.removeprefix(TORCHVISION), config.width):
        raise UsageError(
            f"--init {config.init}: weights of {theirs[0]} of width {theirs[1]:g}, and --arch is {config.arch} of "
            f"width {config.width:g}; give the same"
        )
    return found


def start_from(initial: Teacher, model: nn.Module) -> None:
    """Put the weights into the model, and say what stays fresh: its classifier, where that has another shape.

    Raises:
        UsageError: they cannot be read, or do not fit.
    """
    assert initial.weights is not None
    source = initial.weights
    loaded = teachers.load(initial) if initial.foreign else networks.load(source, networks.describe(source))
    theirs, own = loaded.state_dict(), model.state_dict()
    taken = {name: value for name, value in theirs.items() if name in own and own[name].shape == value.shape}
    fresh = [name for name in own if name not in taken]
    head = networks.classifier_names(initial.network)
    lost = [name for name in fresh if name not in head and not name.startswith((*CLASSIFIERS, *networks.CLASSIFIER))]
    if lost:
        raise UsageError(f"--init {source}: does not fit {initial.network.arch} in {lost[0]}; give another")
    model.load_state_dict(taken, strict=False)
    say(f"retrain: starts from {source}; fresh: {', '.join(fresh) or 'nothing'}")
