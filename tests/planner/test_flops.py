from megavit.planner.flops import NetworkShape, forward_flops, training_flops

B16 = NetworkShape(hidden=768, ffn=3072, layers=12, tokens=197, patches=196, patch_values=768, classes=1000)


def test_vit_b16_takes_35_gigaflops_forward():
    assert round(forward_flops(B16) / 1e9, 1) == 35.1


def test_flops_agree_with_torchs_own_count():
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from megavit.model.config import ModelConfig
    from megavit.model.torch_vit import TorchViT

    config = ModelConfig(hidden_size=32, ffn_size=96, num_heads=4, num_layers=3, patch_size=4)
    shape = NetworkShape(hidden=32, ffn=96, layers=3, tokens=17, patches=16, patch_values=48, classes=10)
    model = TorchViT(config, image_size=[16, 16], channels=3, num_classes=10)
    # Compute attention's products separately: torch 2.14 does not count the CPU's attention kernel, 2.15 also counts
    # the recompute of its backward pass.
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            loss = model(torch.randn(2, 3, 16, 16)).sum()
        forward = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            loss.backward()
    assert forward == 2 * forward_flops(shape)
    assert forward + counter.get_total_flops() == 2 * training_flops(shape)
