"""A teacher in plain PyTorch: its losses, what it leaves alone, and what it refuses."""

import pickle
from copy import deepcopy

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from csg_seg import CSGError, Teacher, retrofit
from csg_seg.distillation import divergence, relative_squared_error

CSG = {'slice_shape': (16, 16, 3, 3), 'code_dim': 16}


class Net(nn.Module):
    """Scores of each pixel, as a tensor or as networks of several libraries return them."""

    def __init__(self, seed=0, returns='tensor', classes=5):
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Conv2d(16, 32, 3, padding=1))
        self.head = nn.Conv2d(32, classes, 1)
        self.returns = returns

    def forward(self, x, scale=1.0):
        scores = self.head(F.relu(self.body(x))) * scale
        return {
            'tensor': scores,
            'torchvision': {'out': scores, 'aux': scores * 2},
            'transformers': {'loss': None, 'logits': scores},
            'tuple': (scores, None),
        }[self.returns]


def images(seed=1):
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


FACTORS = {'logits': 0.5, 'channels': 0.3, 'features': 2.0, 'layers': ['body.0', 'body.*'], 'temperature': 3.0}


@pytest.mark.parametrize('returns', ['tensor', 'torchvision', 'transformers', 'tuple'])
def test_losses_are_those_of_the_definitions(returns):
    student, network = Net(0, returns), Net(1, returns)
    teacher = Teacher(student, network, **FACTORS)
    student(images())
    teacher.observe(images())
    losses = teacher.compare()
    plain = [deepcopy(each) for each in (student, network)]
    for each in plain:
        each.returns = 'tensor'
    mine, wanted = plain[0](images()), plain[1].eval()(images())
    soft, target = (torch.softmax(each / 3, 1) for each in (mine, wanted))
    logits = 9 * (target * (target.log() - soft.log())).sum(1).mean()
    soft, target = (torch.softmax(each.flatten(2) / 3, 2) for each in (mine, wanted))
    channels = 9 * (target * (target.log() - soft.log())).sum(2).mean()
    maps = []
    x, y = images(), images()
    for one, other in zip(plain[0].body, plain[1].body, strict=True):
        x, y = one(x), other(y)
        maps.append((x - y).square().sum() / y.square().sum())
    expected = {'logits': 0.5 * logits, 'channels': 0.3 * channels, 'features': 2 * torch.stack(maps).mean()}
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, msg=name)
    student(images())
    torch.testing.assert_close(teacher.loss(images()), sum(expected.values()))


def test_one_class_score_is_compared_by_its_sigmoid():
    student, network = (nn.Conv2d(3, 1, 1) for _ in range(2))
    teacher = Teacher(student, deepcopy(network), temperature=3)
    mine, wanted = (torch.sigmoid(each(images()) / 3) for each in (student, network))
    expected = 9 * (wanted * (wanted / mine).log() + (1 - wanted) * ((1 - wanted) / (1 - mine)).log()).mean()
    assert expected > 1e-3
    torch.testing.assert_close(teacher.loss(images()), expected)


def test_a_student_that_equals_its_teacher_has_nothing_to_learn():
    student = Net().eval()
    teacher = Teacher(student, Net(), **FACTORS)
    student(images(), scale=2.0)
    assert teacher.loss(images(), scale=2.0).item() == pytest.approx(0, abs=1e-6)


def test_a_generated_student_comes_nearer_to_its_teacher():
    network = Net()
    student = retrofit(Net(1), CSG)
    teacher = Teacher(student, network, features=1.0, layers='body.*')
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    optimizer = torch.optim.SGD(student.parameters(), lr=0.02, momentum=0.9)
    losses = []
    for _ in range(30):
        student(images())
        loss = teacher.loss(images())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert not network.training and all(parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_another_teacher_takes_the_place_of_the_first():
    student, first, second = Net(), Net(1), Net(2)
    alone = Teacher(student, second, **FACTORS)
    student(images())
    wanted = alone.loss(images())
    teacher = Teacher(student, first, **FACTORS)
    teacher.use(second)
    student(images())
    teacher.observe(images())
    first(images())
    torch.testing.assert_close(torch.stack(list(teacher.compare().values())).sum(), wanted)


def test_the_teacher_is_no_part_of_the_student_or_of_its_copies():
    student = Net()
    teacher = Teacher(student, Net(1), **FACTORS)
    assert student.state_dict().keys() == Net().state_dict().keys()
    student(images())
    sizes = [len(pickle.dumps(each)) for each in (student, Net())]
    assert sizes[0] < sizes[1] + 2000
    copy = deepcopy(student)
    copy(images(2))
    wanted = teacher.loss(images())
    student(images())
    torch.testing.assert_close(teacher.loss(images()), wanted)  # BatchNorm's statistics do not change what it computes


def test_evaluations_of_the_student_are_not_compared():
    student = Net()
    teacher = Teacher(student, Net(1))
    student(images())
    with torch.no_grad():
        student(images(2))
    wanted = teacher.loss(images())
    student(images())
    torch.testing.assert_close(teacher.loss(images()), wanted)
    with torch.no_grad():
        student(images())
    with pytest.raises(CSGError, match='the student was not called with gradients'):
        teacher.loss(images())
    with pytest.raises(CSGError, match='the student was not called with gradients'):
        Teacher(student, Net(1), logits=0, features=1.0, layers=['body']).loss(images())


def test_networks_of_torchvision_are_compared_by_their_blocks():
    networks = [torchvision.models.resnet18(num_classes=3) for _ in range(2)]
    teacher = Teacher(retrofit(networks[0], CSG), networks[1], features=1.0, layers=['layer*.*'])
    assert teacher.layers == [f'layer{stage}.{block}' for stage in (1, 2, 3, 4) for block in (0, 1)]
    networks[0](torch.randn(2, 3, 32, 32))
    assert teacher.loss(torch.randn(2, 3, 32, 32)).requires_grad


@pytest.mark.parametrize(
    ('options', 'says'),
    [
        ({'logits': 'much'}, 'logits must be a number'),
        ({'logits': -1}, 'logits must not be negative'),
        ({'temperature': 0}, 'temperature must be above 0'),
        ({'logits': 0}, 'logits, channels, features are all 0'),
        ({'features': 1.0}, 'layers is empty; name some'),
        ({'features': 1.0, 'layers': ['bodi.*']}, "layers pattern 'bodi.\\*' names no module; the nearest are body"),
        ({'logits_layer': 'fc'}, "the student has no layer 'fc'"),
        ({'layers': ['body.*']}, 'features, which is 0'),
        ({'features': 1.0, 'layers': [3]}, 'layers must be patterns'),
    ],
)
def test_wrong_options_are_refused(options, says):
    with pytest.raises(CSGError, match=says):
        Teacher(Net(), Net(1), **options)


def test_scores_of_half_precision_are_compared_in_float32():
    rng = torch.Generator().manual_seed(0)
    scores = [torch.randn(2, 5, 12, 12, generator=rng).bfloat16() for _ in range(2)]
    wanted = divergence(*(each.float().flatten(2) for each in scores), 4.0, dim=2)
    assert divergence(*(each.flatten(2) for each in scores), 4.0, dim=2) == wanted


def test_layers_that_return_dicts_are_compared_and_others_refused():
    student, network = (Net(seed, 'torchvision') for seed in range(2))
    teacher = Teacher(student, network, logits=0, features=1.0, layers=[''])
    student(images())
    assert teacher.loss(images()) > 0
    student = Net(0, 'tuple')
    teacher = Teacher(student, Net(1, 'torchvision'), logits=0, features=1.0, layers=[''])
    student(images())
    with pytest.raises(CSGError, match='does not return the same number of tensors'):
        teacher.loss(images())


def test_networks_that_share_parameters_are_refused_and_stay_trainable():
    network = Net()
    student = retrofit(network, CSG)  # in place
    with pytest.raises(CSGError, match='share parameters; copy the network before retrofit'):
        Teacher(student, network)
    with pytest.raises(CSGError, match='share parameters'):
        Teacher(student, student.head, logits_layer='')
    assert all(parameter.requires_grad for parameter in student.parameters())
    with pytest.raises(CSGError, match='must be a module; got OrderedDict'):
        Teacher(student, network.state_dict())


def test_a_trainer_cannot_put_the_teacher_into_training_mode():
    student, network = Net(), Net(1)
    teacher = Teacher(student, network)
    student(images())
    wanted = teacher.loss(images())
    network.train()
    student(images())
    torch.testing.assert_close(teacher.loss(images()), wanted)


def test_outputs_that_cannot_be_compared_are_refused():
    student = Net()
    for network, says in (
        (
            Net(classes=4),
            r'the output of the network is \(2, 4, 8, 8\) in the teacher and \(2, 5, 8, 8\) in the student',
        ),
        (nn.Sequential(nn.Conv2d(3, 5, 3)), r'is \(2, 5, 6, 6\) in the teacher'),
    ):
        teacher = Teacher(student, network)
        student(images())
        with pytest.raises(CSGError, match=says):
            teacher.loss(images())
    with pytest.raises(CSGError, match='no class scores in the output'):
        silent = Net(returns='torchvision')
        silent.register_forward_hook(lambda module, inputs, output: {'masks': output['out']})
        teacher = Teacher(silent, deepcopy(silent))
        silent(images())
        teacher.loss(images())
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    with pytest.raises(CSGError, match='channels compares pixels'):
        teacher = Teacher(classifier, deepcopy(classifier), channels=1.0)
        classifier(images())
        teacher.loss(images())


def test_a_copy_of_a_student_needs_a_teacher_of_its_own():
    student = Net()
    copies = {}

    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.student = student
            copies['teacher'] = self.teacher = Teacher(student, Net(1))

    copy = deepcopy(Holder())
    with pytest.raises(CSGError, match='call use'):
        copy.teacher.loss(images())
    copy.teacher.use(Net(1))
    copy.student(images())
    assert copy.teacher.loss(images()) > 0


def test_swapped_and_compiled_networks_are_refused():
    student = retrofit(Net(), CSG)
    with pytest.raises(CSGError, match='the student comes first'):
        Teacher(Net(1), student)
    with pytest.raises(CSGError, match='the student must be a module; got str'):
        Teacher('net.pth', Net(1))
    with pytest.raises(CSGError, match='the student is compiled'):
        Teacher(torch.compile(student), Net(1))


def test_an_empty_map_of_the_teacher_is_not_compared():
    values = torch.ones(2, 3, requires_grad=True)
    error = relative_squared_error(values, torch.zeros(2, 3))
    error.backward()
    assert error == 0 and values.grad.isfinite().all()
