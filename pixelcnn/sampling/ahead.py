"""Compile the sampler before there is a model to sample from: its code is the same for all networks."""

import subprocess
import sys
import threading

from pixelcnn.models.gated_pixelcnn import GatedPixelCNNConfig
from pixelcnn.models.registry import build_model
from pixelcnn.sampling.fast import sample_in_torch_during, warm_up


def compile_sampler() -> float:
    """Compile the sampler; return the seconds it took: some the first time on a machine, about one later."""
    config = GatedPixelCNNConfig(image_shape=(1, 4, 4), num_levels=2, num_features=8, num_layers=2, kernel_size=3)
    return warm_up(build_model(config))


def compile_in_background() -> threading.Thread:
    """Compile the sampler in a thread, which is returned: until it ends, all is sampled in torch.

    For a process whose first user is not to wait for it. Later images are of the same model and noise, and equal but
    for rounding.
    """

    def work() -> None:
        # By another process, which leaves the code on disk: beside a compiler the threads of this one would rarely
        # have their turn.
        command = ["nice", sys.executable, "-m", "pixelcnn", "compile"]
        subprocess.run(command, capture_output=True, check=False)
        compile_sampler()

    thread = threading.Thread(target=work, name="compile", daemon=True)
    sample_in_torch_during(thread)
    thread.start()
    return thread
