"""Dense training that pulls weights towards the nearest generated ones."""

import pytest
from small_classifier import CSG, build, build_runner, csg_model, dense_model, save_images

from csg_seg.errors import CSGError
from csg_seg.layers.conv import generated_convs
from experiments.carry_over import proximal  # noqa: F401


@pytest.fixture
def runner(tmp_path):
    """Build a Runner with the hook."""
    save_images(tmp_path / 'images.npz')

    def build_one(work_dir, **settings):
        hook = dict(type='ProximalHook', csg=CSG, **settings)
        return build_runner(tmp_path / 'images.npz', dense_model(), work_dir, default_hooks=dict(proximal=hook))

    return build_one


def test_the_hook_brings_weights_nearer_to_generated_ones(runner, tmp_path):
    distances = []
    for strength in (1e-9, 0.5):
        run = runner(tmp_path / str(strength), strength=strength, interval=3)
        run.train()
        student = build(csg_model(CSG))
        student.load_state_dict(run.model.state_dict())
        dense = dict(run.model.named_parameters())
        distances.append(
            sum(
                ((conv.generate_weight() - dense[f'{name}.weight']).norm() / dense[f'{name}.weight'].norm()).item()
                for name, conv in generated_convs(student)
            )
        )
    assert distances[1] < 0.7 * distances[0]


def test_weights_that_are_not_finite_are_named(runner, tmp_path):
    run = runner(tmp_path / 'run')
    run.model.backbone.layer1[0].conv1.weight.data[0, 0, 0, 0] = float('nan')
    with pytest.raises(CSGError, match=r'backbone.layer1.0.conv1.weight holds NaN or infinite'):
        run.train()
