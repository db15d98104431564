"""What ``meansparse run`` asks before its first stage begins: would a later one refuse its settings?"""

from pathlib import Path

from ..attacks import expand_attacks
from ..data.splits import DataSet, Split, SplitName, take_examples
from ..engine.image_files import read_images
from ..errors import DataError
from ..models.source import kind_of
from ..runs.device import pick_device
from ..runs.folder import Run
from ..selection.search import check_blocks
from ..selection.sweep import families_of
from ..settings.stages import CalibrateConfig, EvaluateConfig, FetchConfig, StageConfig, SweepAlphaConfig
from ..settings.values import eps_for
from .calibrate import chosen_images


def check_all(
    run: Run, fetch: FetchConfig, calibrate: CalibrateConfig, sweep: SweepAlphaConfig, evaluate: EvaluateConfig
) -> None:
    """Raise what a stage would raise about its attacks, budget, device, data set or number of images."""
    families_of(sweep.attack, sweep.objective)
    expand_attacks(evaluate.attack)
    for attacked in (sweep, evaluate):
        eps_for(attacked.eps, run.source.dataset, attacked.norm or run.norm)
    for stage in (calibrate, sweep, evaluate):
        pick_device(stage.device)
    for file in evaluate.pool:
        read_images(file)

    def split(config: StageConfig, name: SplitName) -> Split:
        dataset = config.dataset or calibrate.dataset or run.source.dataset
        data_dir: Path | None = config.data_dir or calibrate.data_dir
        named = config.preprocessing or calibrate.preprocessing
        images = DataSet(dataset, data_dir, kind_of(run.source).preprocessing(named)).split(name)
        if not len(images):
            raise DataError(f"the {name} split is empty", hint="is this the folder of a data set? --data-dir DIR")
        return images

    if calibrate.statistics == "measured":
        chosen_images(calibrate, split(calibrate, "calibration"))
    held_out = split(sweep, "held-out")
    is_given = "n_examples" in sweep.model_fields_set
    n = sweep.n_examples if is_given else min(sweep.n_examples or len(held_out), len(held_out))
    n_swept = len(take_examples(held_out, n))
    if sweep.alpha_rule != "shared":
        check_blocks(n_swept, sweep.block_size)
    take_examples(split(evaluate, evaluate.split), evaluate.n_examples)
