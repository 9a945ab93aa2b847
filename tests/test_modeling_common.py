"""What transformers' own test suite asks of every model: each class with each kind of network."""

import copy

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, MODEL_MAPPING, AutoModel, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

import modeling_dls
from modeling_dls import ESResNetConfig, ESResNetForAudioClassification, ESResNetModel, modeling_esresnet

HEADS = {getattr(modeling_dls, name): getattr(transformers, auto) for name, auto in modeling_dls.MODELS.items()}
NETWORKS = {
    "mean": {},
    "mean without attention": {"attention": False},
    "statistics": {"pooling": "statistics", "pooler_act": "asinh"},
    "dense": {"layer_type": "bottleneck", "hidden_sizes": None, "growth_rate": 4},
}
every_head = pytest.mark.parametrize("head", HEADS)
every_network = pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)


def make_model(head, network, **overrides):
    sizes = {"embedding_size": 8, "hidden_sizes": (8, 12), "depths": (1, 1), "layer_type": "basic"}
    torch.manual_seed(0)
    return head(ESResNetConfig(**{**sizes, "embedding_dim": 6, "num_labels": 3, **network, **overrides}))


def used_model(head, network):
    """A model in evaluation mode whose batch norms have seen a batch."""
    model = make_model(head, network)
    model(pictures(seed=7))
    return model.eval()


def pictures(seed=1):
    return torch.randn(4, 2, 3, 32, 48, generator=torch.Generator().manual_seed(seed))


def answer(outputs):
    """Logits, embeddings or pooled features."""
    return next(outputs[name] for name in ("logits", "embeddings", "pooler_output") if name in outputs)


def objective(outputs):
    return (answer(outputs) * torch.arange(answer(outputs).numel()).view(4, -1).cos()).sum()


def assert_same(actual, expected, **tolerance):
    """Of two models' outputs, hidden states included, or of two states."""
    assert actual.keys() == expected.keys()
    torch.testing.assert_close(tuple(actual.values()), tuple(expected.values()), **tolerance)


@every_network
@every_head
def test_initialisation_leaves_nothing_out_and_is_the_same_on_the_meta_device(head, network, tmp_path):
    expected = make_model(head, network)
    assert_same(make_model(head, network).state_dict(), expected.state_dict(), rtol=0, atol=0)
    for module in expected.modules():
        module._is_hf_initialized = False
    for tensor in expected.state_dict().values():
        tensor.fill_(99)
    torch.manual_seed(0)
    expected.init_weights()
    assert not any((tensor == 99).any() for tensor in expected.state_dict().values())
    # A checkpoint without any of the weights: from_pretrained builds on the meta device and has to fill in all.
    expected.save_pretrained(tmp_path, state_dict={"other": torch.zeros(1)})
    torch.manual_seed(0)
    assert_same(head.from_pretrained(tmp_path).state_dict(), expected.state_dict(), rtol=0, atol=0)


@every_network
@every_head
def test_a_saved_model_answers_the_same(head, network, tmp_path):
    model = used_model(head, network)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(pictures(), output_hidden_states=True)
        assert_same(head.from_pretrained(tmp_path)(pictures(), output_hidden_states=True), expected)


@every_network
@every_head
def test_each_clip_alone_gives_its_row_of_the_batch(head, network):
    model = used_model(head, network)
    with torch.no_grad():
        batch = model(pictures(), output_hidden_states=True)
        for clip in range(4):
            alone = model(pictures()[clip : clip + 1], output_hidden_states=True)
            row = {name: batch[name][clip : clip + 1] for name in batch if name != "hidden_states"}
            row["hidden_states"] = tuple(state[clip : clip + 1] for state in batch.hidden_states)
            assert_same(alone, row, rtol=1e-4, atol=1e-5)


@every_network
@every_head
def test_hidden_states_are_on_the_way_to_the_answer(head, network):
    model = used_model(head, network)
    outputs = model(pictures(), output_hidden_states=True)
    assert len(outputs.hidden_states) == 3
    if head is ESResNetModel:
        assert outputs.last_hidden_state is outputs.hidden_states[-1]
    # What autograd says of each, and what a person finds who asks it to keep gradients.
    gradients = torch.autograd.grad(objective(outputs), outputs.hidden_states, retain_graph=True)
    for state in outputs.hidden_states:
        state.retain_grad()
    objective(outputs).backward()
    for state, gradient in zip(outputs.hidden_states, gradients, strict=True):
        assert state.shape[:2] == (4, 2) and gradient.any()
        torch.testing.assert_close(state.grad, gradient)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [True, False])
@every_network
@every_head
def test_gradient_checkpointing_changes_neither_gradients_nor_statistics(head, network, use_reentrant):
    plain = make_model(head, network)
    model = copy.deepcopy(plain)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert sum(isinstance(module, GradientCheckpointingLayer) for module in model.modules()) == 2
    runs = []
    for stage in model.base_model.stages:
        next(stage.children()).register_forward_pre_hook(lambda *_: runs.append(1))
    for each in (model, plain):
        objective(each(pictures())).backward()
    assert len(runs) == 2 * 2  # two stages, forward and once more in backward
    assert_same(*({name: p.grad for name, p in each.named_parameters()} for each in (model, plain)))
    assert_same(model.state_dict(), plain.state_dict(), rtol=0, atol=0)


@every_network
def test_a_new_label_set(network, tmp_path):
    used_model(ESResNetForAudioClassification, network).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="size"):
        ESResNetForAudioClassification.from_pretrained(tmp_path, num_labels=5)
    model = ESResNetForAudioClassification.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    saved = ESResNetModel.from_pretrained(tmp_path)
    assert_same(model.base_model.state_dict(), saved.state_dict(), rtol=0, atol=0)
    assert model.config.num_labels == 5 and model(pictures()).logits.shape == (4, 5)


# Auto classes


def test_every_head_is_registered_and_exported():
    found = [each for each in vars(modeling_esresnet).values() if isinstance(each, type)]
    registered = [each for each in found if issubclass(each, PreTrainedModel) and each._auto_class]
    assert {each.__name__: each._auto_class for each in registered} == modeling_dls.MODELS
    assert modeling_dls.MODELS["ESResNetModel"] == "AutoModel"
    assert modeling_dls.MODELS["ESResNetForAudioClassification"] == "AutoModelForAudioClassification"
    assert modeling_dls.MODELS["ESResNetForInstanceDiscrimination"] == "AutoModelForAudioXVector"
    assert set(modeling_dls.__all__) >= set(modeling_dls.MODELS) and AutoModel._model_mapping is MODEL_MAPPING


@every_head
def test_auto_mappings_hold_the_class_itself(head):
    auto_class, model = HEADS[head], make_model(head, {})
    mapping = auto_class._model_mapping
    assert mapping[ESResNetConfig] is head and mapping.get(ESResNetConfig, None) is head
    assert ESResNetConfig in mapping and ESResNetConfig in list(mapping)
    assert type(auto_class.from_config(model.config)) is head
    if head is not ESResNetModel:  # transformers' own values of MODEL_MAPPING cannot all be imported
        assert type(model) in mapping.values() and (ESResNetConfig, head) in mapping.items()
        assert all(issubclass(value, PreTrainedModel) for value in mapping.values())
    assert CONFIG_MAPPING["esresnet"] is ESResNetConfig and list(CONFIG_MAPPING).count("esresnet") == 1


@pytest.mark.skipif(
    not hasattr(type(MODEL_MAPPING), "_from_pickle"), reason="this transformers cannot copy its mappings"
)
@every_head
def test_auto_mappings_can_be_copied(head):
    copied = copy.deepcopy(HEADS[head]._model_mapping)
    assert ESResNetConfig in copied and copied[ESResNetConfig] is head


@pytest.mark.parametrize("trust", [None, True, False])
@every_head
def test_auto_classes_load_whether_a_checkpoints_code_is_trusted_or_not(head, trust, tmp_path):
    model = used_model(head, {})
    model.save_pretrained(tmp_path)
    loaded = HEADS[head].from_pretrained(tmp_path, trust_remote_code=trust)
    # The first transformers 5 take the checkpoint's copy of this package where it is trusted.
    assert type(loaded) is head or (trust and type(loaded).__name__ == head.__name__)
    with torch.no_grad():
        assert_same(loaded(pictures()), model(pictures()))


@every_head
def test_a_whole_model_can_be_pickled(head, tmp_path):
    model = used_model(head, {})
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    with torch.no_grad():
        assert_same(loaded(pictures()), model(pictures()))
