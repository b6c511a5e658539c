"""Drawing in half precision: the network alone."""

import torch

from ldm.drawing.precision import in_precision


def test_a_second_time_reaches_the_network_and_float32_comes_back():
    """As sampler=flow_map asks: (x_t, t, to)."""
    seen = []

    def guidance(model, ask):
        def denoise(x_t, t, *to):
            seen.append((to, torch.is_autocast_enabled("cpu")))
            return x_t.bfloat16()

        return denoise

    denoise = in_precision(guidance, "bf16", torch.device("cpu"))(None, {})
    assert denoise(torch.ones(1), torch.tensor(1.0)).dtype == torch.float32
    denoise(torch.ones(1), torch.tensor(1.0), torch.tensor(0.0))
    assert seen == [((), True), ((torch.tensor(0.0),), True)]
    assert in_precision(guidance, "32", torch.device("cpu")) is guidance
