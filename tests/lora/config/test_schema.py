"""The config: defaults as the contract has them, and every refusal with its words."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml

from lora.config.errors import dotted_keys
from lora.config.other_names import OTHER_NAMES
from lora.config.schema import AdapterConfig, Config, load_config
from lora.shaders.errors import InputError
from tests.support.architectures import LLAMA, PHI3
from tests.support.config_files import LEAST, refusal, write


def test_the_contracts_defaults(path: str) -> None:
    assert load_config(path).model_dump() == {
        "model": {"path": "m.gguf", "tokenizer": None},
        "adapter": {
            "rank": 16,
            "alpha": 32.0,
            "dropout": 0.0,
            "targets": "all-linear",
            "exclude": [],
            "layers": "all",
            "rank_pattern": {},
            "alpha_pattern": {},
            "trainable_tokens": [],
            "variant": "lora",
            "loraplus_lr_ratio": None,
            "init": "default",
            "init_from": None,
            "peft_layers": "auto",
        },
        "data": {
            "train": "t.jsonl",
            "eval": None,
            "eval_share": None,
            "format": "auto",
            "columns": {},
            "max_length": 512,
            "overflow": "cut",
            "packing": False,
            "streaming": False,
            "shuffle_buffer": 1000,
            "chat_template": None,
            "chat_template_kwargs": {},
            "train_on": "completion",
            "roles_to_train": ["assistant"],
            "train_on_eos": "turn",
            "append_eos": "auto",
            "shuffle": True,
        },
        "train": {
            "epochs": 1.0,
            "steps": None,
            "batch_size": 4,
            "gradient_accumulation": 1,
            "learning_rate": 2e-4,
            "schedule": "cosine",
            "schedule_kwargs": {},
            "optimizer": "adamw",
            "neftune_noise_alpha": None,
            "label_smoothing": 0.0,
            "loss_type": "nll",
            "warmup_ratio": 0.03,
            "warmup_steps": None,
            "weight_decay": 0.0,
            "betas": [0.9, 0.999],
            "epsilon": 1e-8,
            "max_grad_norm": 1.0,
            "precision": "auto",
            "recompute": "auto",
            "tuning": "auto",
            "reuse_frozen_prefix": "auto",
            "seed": 0,
            "eval_every": None,
            "eval_at_start": True,
            "eval_samples": None,
            "best": "auto",
            "load_best_model_at_end": False,
            "early_stopping_patience": None,
            "early_stopping_threshold": 0.0,
            "sample_prompts": [],
            "sample_every": None,
            "sample_tokens": 64,
            "report_to": [],
            "save_every": "10m",
            "on_device_loss": "stop",
            "max_submission_seconds": None,
            "keep_checkpoints": 3,
            "comm_dtype": "f32",
            "memory_limit": "auto",
        },
        "device": "auto",
        "webgpu": "auto",
        "output": "runs/x",
        "hub": None,
    }


def test_numbers_that_pyyaml_leaves_as_text(path: str) -> None:
    text = LEAST + "train: {learning_rate: 1e-5, epsilon: 1E-6, betas: [9e-1, .5e0]}\n"
    assert yaml.safe_load(text)["train"]["learning_rate"] == "1e-5"
    train = load_config(write(path, text)).train
    assert (train.learning_rate, train.epsilon, train.betas) == (1e-5, 1e-6, [0.9, 0.5])


def test_on_and_off_which_pyyaml_reads_as_booleans(path: str) -> None:
    text = LEAST + "train: {recompute: on, reuse_frozen_prefix: off}\n"
    config = load_config(write(path, text), ["data.append_eos=off"])
    assert (config.train.recompute, config.train.reuse_frozen_prefix) == ("on", "off")
    assert config.data.append_eos == "off"


def test_a_section_of_comments_only_means_the_defaults(path: str) -> None:
    assert load_config(write(path, LEAST + "train:\n  # steps: 3\nadapter:\n")) == load_config(
        write(path, LEAST)
    )


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["adapter.layers={last: 8}", "adapter.targets=[q_proj, v_proj]", "adapter.variant=rslora"],
        ["adapter.layers=[1, 5]", "train.learning_rate=1e-5", "train.recompute=on"],
        ["train.warmup_steps=3", "data.train=[a.jsonl, b.jsonl]", "data.eval=e.jsonl", "device=1"],
        ["train.warmup_ratio=null", "train.max_grad_norm=null", "train.eval_every=null"],
    ],
)
def test_the_dump_reads_back_equal(path: str, overrides: list[str], tmp_path: Path) -> None:
    config = load_config(path, overrides)
    again = load_config(write(str(tmp_path / "again.yaml"), config.dump_yaml()))
    assert again == config
    assert again.dump_yaml() == config.dump_yaml()


def test_overrides(path: str) -> None:
    config = load_config(path, ["train.steps=10", "train.steps=20", "model.tokenizer=dir=x"])
    assert config.train.steps == 20
    assert config.model.tokenizer == "dir=x"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.learning_rat=1", "unknown key; did you mean learning_rate?"),
        ("learning_rate=1", "unknown key; did you mean train.learning_rate?"),
        ("trian={}", "unknown key; did you mean train?"),
        (
            "zzz=1",
            "unknown key; allowed here: model, adapter, data, train, device, webgpu, output, hub.",
        ),
        ("data.mask_history=true", "unknown key; its name here is data.train_on: last."),
        (
            "train.enable_thinking=true",
            "unknown key; its name here is data.chat_template_kwargs: {",
        ),
        ("sample_packing=true", "unknown key; its name here is data.packing."),
        ("adapter.lora_r=8", "unknown key; its name here is adapter.rank."),
        ("train.lr=1", "unknown key; its name here is train.learning_rate."),
        ("data.train_on=x", "got 'x'; allowed here: completion, all or last."),
        ("data.train_on_eos=x", "got 'x'; allowed here: turn, all, last or none."),
        ("data.roles_to_train=[]", "got []; allowed here: a list of roles, such as [assistant]."),
        ("data.roles_to_train=user", "got 'user'; allowed here: a list of roles"),
        (
            "data.chat_template_kwargs=[1]",
            "got [1]; allowed here: a mapping of the chat template's",
        ),
        ("data.chat_template_kwargs={1: 2}", "got {1: 2}; allowed here: a mapping of the chat"),
        ("data.chat_template=3", "got 3; allowed here: null, a file that holds a Jinja"),
        ("data.zzz=1", "unknown key; allowed here: train, eval, eval_share, format, columns, m"),
        ("model=5", "got 5; allowed here: a mapping with the keys path, tokenizer."),
        ("train=[1]", "got [1]; allowed here: a mapping with the keys "),
        ("model.path=", "got None; allowed here: the path of a GGUF file, ollama:N"),
        ("model.path=''", "got ''; allowed here: the path of a GGUF file, ollama:NAM"),
        ("model.tokenizer=3", "got 3; allowed here: null, a tokenizer.json, or a directory"),
        ("adapter.rank=0", "got 0; allowed here: a whole number of at least 1."),
        ("adapter.rank=true", "got True; allowed here: a whole number of at least 1."),
        ("adapter.rank=8.0", "got 8.0; allowed here: a whole number of at least 1."),
        ("adapter.rank='8'", "got '8'; allowed here: a whole number of at least 1."),
        ("adapter.alpha=0", "got 0; allowed here: a number above 0."),
        ("adapter.alpha=.nan", "got nan; allowed here: a number above 0."),
        ("adapter.targets=q_prj", "got 'q_prj'; did you mean q_proj?"),
        ("adapter.targets=[self_attn.q_prj]", "got 'self_attn.q_prj'; did you mean q_proj?"),
        ("adapter.targets='.*(q_proj'", "got '.*(q_proj', which is no regular expression ("),
        ("adapter.exclude=[q_prj]", "got 'q_prj'; did you mean q_proj?"),
        ("adapter.exclude=[q_proj, q_proj]", "got 'q_proj' twice; name each matrix once."),
        ("adapter.rank_pattern={q_proj: 0}", "got {'q_proj': 0}; allowed here: ranks of at least"),
        ("adapter.rank_pattern={'(q': 8}", "got '(q', which is no regular expression ("),
        ("adapter.alpha_pattern={q_proj: -1}", "got {'q_proj': -1}; allowed here: alphas above 0"),
        ("adapter.dropout=1", "got 1; allowed here: a number from 0 to below 1."),
        ("adapter.loraplus_lr_ratio=0", "got 0; allowed here: null, or a number above 0 that"),
        ("adapter.init=xavier", "got 'xavier'; allowed here: default or gaussian."),
        ("adapter.init=pissa_niter_16", "got 'pissa_niter_16'; it takes a part out of the base's"),
        ("adapter.init=olora", "got 'olora'; it takes a part out of the base's weights"),
        ("adapter.init=loftq", "got 'loftq'; it takes a part out of the base's weights"),
        ("adapter.layers=7-4", "got '7-4'; a range begins with its lower number, as 4-7."),
        ("adapter.layers=[1-3, 2]", "got the layer 2 twice; name each layer once."),
        ("adapter.targets=[q_prj]", "got 'q_prj'; did you mean q_proj?"),
        ("adapter.targets=[xyz]", "got 'xyz'; allowed here: all-linear, or a list of q_proj, k_"),
        ("adapter.targets=[]", "got an empty list, so nothing would be trained; allowed here"),
        ("adapter.targets=[q_proj, q_proj]", "got 'q_proj' twice; name each matrix once."),
        ("adapter.layers=some", "got 'some'; allowed here: all, {last: N} with N at least 1, a"),
        ("adapter.layers={last: 0}", "got {'last': 0}; allowed here: all, {last: N} with N at"),
        ("adapter.layers={first: 2}", "got {'first': 2}; allowed here: all, {last: N} with N"),
        ("adapter.layers=[-1]", "got [-1]; allowed here: all, {last: N} with N at least 1, a"),
        ("adapter.layers=[]", "got an empty list, so nothing would be trained; try all."),
        ("adapter.layers=[3, 3]", "got the layer 3 twice; name each layer once."),
        ("adapter.variant=lokr", "got 'lokr'; allowed here: lora, rslora or dora."),
        ("data.train=[]", "got []; allowed here: a file, a directory, the name of a Hugging Face"),
        ("data.eval=[3]", "got 3; allowed here: a file, a directory, the name of a Hugging"),
        ("data.format=chatt", "got 'chatt'; allowed here: auto, chat, completion, instruct or"),
        ("data.max_length=1", "got 1; allowed here: a whole number of tokens, at least 2."),
        ("data.packing=1", "got 1; allowed here: true or false."),
        ("data.train_on=prompt", "got 'prompt'; allowed here: completion, all or last."),
        ("data.append_eos=maybe", "got 'maybe'; allowed here: auto, on or off."),
        ("train.epochs=0", "got 0; allowed here: a number above 0."),
        ("train.steps=0", "got 0; allowed here: null, or a whole number of at least 1."),
        ("train.batch_size=0", "got 0; allowed here: a whole number of at least 1."),
        ("train.gradient_accumulation=x", "got 'x'; allowed here: a whole number of at least 1."),
        ("train.learning_rate=fast", "got 'fast'; allowed here: a number above 0."),
        ("train.learning_rate=-1e-5", "got '-1e-5'; allowed here: a number above 0."),
        ("train.learning_rate=.inf", "got inf; allowed here: a number above 0."),
        ("train.schedule=cosin", "got 'cosin'; allowed here: constant, constant_with_warmup, li"),
        ("train.optimizer=sgd", "got 'sgd'; allowed here: adamw, adamw_8bit, lion."),
        ("train.neftune_noise_alpha=0", "got 0; allowed here: null, or a number above 0; 5 is"),
        ("train.label_smoothing=1", "got 1; allowed here: a number from 0 to below 1; 0.1 is"),
        ("train.loss_type=gspo", "got 'gspo'; allowed here: nll or dft."),
        ("train.warmup_ratio=1", "got 1; allowed here: a number from 0 to below 1, the share of"),
        ("train.warmup_steps=-1", "got -1; allowed here: null, or a whole number of at least 0."),
        ("train.weight_decay=-1", "got -1; allowed here: a number of at least 0."),
        ("train.betas=[0.9, 1.0]", "got [0.9, 1.0]; allowed here: two numbers from 0 to below 1."),
        ("train.betas=[0.9]", "got [0.9]; allowed here: two numbers from 0 to below 1."),
        ("train.epsilon=0", "got 0; allowed here: a number above 0."),
        ("train.max_grad_norm=0", "got 0; allowed here: a number above 0, or null for no clip"),
        ("train.precision=bf16", "got 'bf16'; allowed here: auto, f32 or f16."),
        ("train.recompute=always", "got 'always'; allowed here: auto, on or off."),
        ("train.reuse_frozen_prefix=2", "got 2; allowed here: auto, on or off."),
        ("train.seed=-1", "got -1; allowed here: a whole number from 0 to 4294967295."),
        ("train.eval_every=0", "got 0; allowed here: null, a whole number of steps, or epochs su"),
        ("train.save_every=0", "got 0; allowed here: null, a whole number of steps, or a time"),
        ("train.save_every=10x", "got '10x'; allowed here: null, a whole number of steps, or a t"),
        ("train.save_every=0m", "got '0m'; allowed here: null, a whole number of steps, or a tim"),
        ("train.on_device_loss=go", "got 'go'; allowed here: stop or retry."),
        ("train.max_submission_seconds=0", "got 0; allowed here: null, or a number of seconds abo"),
        ("train.keep_checkpoints=0", "got 0; allowed here: a whole number of at least 1."),
        ("webgpu=metal", "got 'metal'; allowed here: auto, wgpu or dawn."),
        (
            "device=true",
            "got True; allowed here: auto, shared, a device's index, or part of its name.",
        ),
        ("train.comm_dtype=bf16", "got 'bf16'; allowed here: f32 or f16."),
        ("output=", "got None; allowed here: the directory that the run writes to."),
    ],
)
def test_refused_values(path: str, override: str, words: str) -> None:
    key = override.partition("=")[0]
    assert refusal(path, override).startswith(f"--set {override}: {key}: {words}")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.schedule_kwargs={num_cycle: 1}"], "cosine has no 'num_cycle'; did you mean num_c"),
        (["train.schedule=linear", "train.schedule_kwargs={min_lr: 1}"], "has no 'min_lr'; it t"),
        (["train.schedule_kwargs={num_cycles: 0}"], "num_cycles is 0; allowed: a number above 0."),
        (["train.schedule=cosine_with_min_lr"], "give one of min_lr (a rate) and min_lr_rate"),
        (["train.schedule=cosine_with_restarts", "train.schedule_kwargs={num_cycles: 1.5}"],
         "num_cycles is 1.5; allowed: a whole number above 0."),
        (["train.schedule=warmup_stable_decay"], "give num_decay_steps in schedule_kwargs"),
        (["train.schedule=warmup_stable_decay", "train.schedule_kwargs={num_decay_steps: 2, "
          "decay_type: sqrt}"], "decay_type is 'sqrt'; allowed: linear, cosine, 1-sqrt."),
        (["train.optimizer=lion", "train.epsilon=1e-6"], "epsilon (1e-06) has no place in it"),
        (["train.label_smoothing=0.1", "train.loss_type=dft"], "keep one."),
        (["adapter.variant=dora", "adapter.dropout=0.1"], "computed twice; that is not supported"),
        (["adapter.init=gaussian", "adapter.init_from=x"], "begins with its own numbers"),
    ],
)  # fmt: skip
def test_what_does_not_go_together(path: str, overrides: list[str], words: str) -> None:
    assert words in refusal(path, *overrides)


def test_errors_in_the_file_name_the_file(path: str) -> None:
    write(path, LEAST + "train: {learning_rat: 1, epochs: -1}\n")
    assert refusal(path) == (
        f"{path}: train.epochs: got -1; allowed here: a number above 0.\n"
        f"{path}: train.learning_rat: unknown key; did you mean learning_rate?"
    )


def test_missing_keys(path: str) -> None:
    write(path, "model: {}\noutput: runs/x\n")
    assert refusal(path) == (
        f"{path}: model.path: missing; give the path of a GGUF file, ollama:NAME[:TAG], "
        "hf:ORG/REPO[:QUANTIZATION], or hf:ORG/REPO/FILE.\n"
        f"{path}: data: missing; give a mapping with the keys train, eval, eval_share, format, "
        "columns, max_length, overflow, packing, streaming, shuffle_buffer, chat_template, "
        "chat_template_kwargs, train_on, roles_to_train, train_on_eos, append_eos, shuffle."
    )


def test_keys_that_are_no_text(path: str) -> None:
    message = refusal(write(path, LEAST + "1: 2\n"))
    assert message.startswith(f"{path}: 1: unknown key; allowed here: model, adapter, data")


def test_both_warmups(path: str) -> None:
    message = refusal(write(path, LEAST + "train: {warmup_ratio: 0.1, warmup_steps: 5}\n"))
    assert message == (
        f"{path}: train: warmup_ratio (0.1) and warmup_steps (5) are both given; keep one and "
        "set the other to null."
    )
    assert load_config(path, ["train.warmup_ratio=null"]).train.resolve_warmup(100) == 5


def test_warmup_steps() -> None:
    def resolve(**values: object) -> int:
        config = Config.model_validate(
            {
                "model": {"path": "m"},
                "data": {"train": "t"},
                "output": "o",
                "train": values,
            }
        )
        return config.train.resolve_warmup(110)

    assert resolve() == 4
    assert resolve(warmup_steps=7) == 7
    assert resolve(warmup_steps=0) == 0
    assert resolve(warmup_ratio=0) == 0
    assert resolve(warmup_ratio=None) == 0
    assert resolve(warmup_steps=110) == 110
    with pytest.raises(InputError, match="warmup_steps: got 111, but the run has 110 steps"):
        resolve(warmup_steps=111)


def test_eval_every_needs_something_to_evaluate_on(path: str) -> None:
    message = refusal(path, "train.eval_every=3")
    assert message == (
        f"{path}: train.eval_every is 3, but data.eval is null; name the examples to evaluate on, "
        "or leave train.eval_every out."
    )
    load_config(path, ["train.eval_every=3", "data.eval=e.jsonl"])


@pytest.mark.parametrize("override", ["train.steps", "=3", "train.=3", ".=1", ""])
def test_overrides_that_are_no_key_and_value(path: str, override: str) -> None:
    assert refusal(path, override) == (
        f"--set {override}: write it as KEY=VALUE, for example train.steps=10."
    )


def test_overrides_below_a_value(path: str) -> None:
    assert refusal(path, "model.path.x=1") == (
        "--set model.path.x=1: model.path holds 'm.gguf', not a mapping."
    )


def test_overrides_that_are_no_yaml(path: str) -> None:
    assert refusal(path, "train.betas=[1").startswith("--set train.betas=[1, line 1: not valid YA")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: [1, 2\nc: 3\n", ", line 3: not valid YAML: "),
        ("a: b: c\n", ", line 1: not valid YAML: mapping values are not allowed here."),
        ("a: 1\n\tb: 2\n", ", line 2: not valid YAML: found character '\\t' that cannot start"),
        (LEAST + "output: y\n", ", line 4: not valid YAML: the key 'output' stands here a second"),
        ("", ": holds nothing; a config is a mapping of keys to values."),
        ("- 1\n", ": holds [1]; a config is a mapping of keys to values."),
        ("a: 2026-99-99\n", ": not valid YAML: month must be in 1..12"),
        ("a: \x00\n", ": not valid YAML: unacceptable character"),
    ],
)
def test_files_that_are_no_config(path: str, text: str, words: str) -> None:
    assert refusal(write(path, text)).startswith(path + words)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    absent = str(tmp_path / "absent.yaml")
    assert refusal(absent) == f"{absent}: there is no such file."
    assert refusal(str(tmp_path)).startswith(f"{tmp_path}: cannot be read (")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"GGUF\xff\xfe")
    assert refusal(str(binary)) == f"{binary}: not a text file in UTF-8."


@pytest.mark.parametrize(
    ("name", "again"),
    [
        (
            "m/a b.Q4_1.gguf",
            "is a model, .* lora init --model 'm/a b.Q4_1.gguf' --data DATA writes",
        ),
        ("hf:org/repo", "is a model, .* lora train --model hf:org/repo --data DATA needs none"),
        ("rows.jsonl", "is data, .* lora init --model MODEL --data rows.jsonl writes one"),
        ("rows.json.gz", "is data, .* lora train --model MODEL --data rows.json.gz needs none"),
    ],
)
def test_a_model_or_data_in_place_of_a_config(name: str, again: str) -> None:
    with pytest.raises(InputError, match=again):
        load_config(name)


def test_other_tools_names_lead_to_keys_that_are_there() -> None:
    ours = set(dotted_keys(Config))
    for theirs, name in OTHER_NAMES.items():
        assert name.partition(":")[0] in ours, theirs
        assert theirs == theirs.lower()
        # A name of ours in the wrong section gets the section named.
        assert theirs not in {key.rpartition(".")[2] for key in ours}, theirs


def test_train_on_all_leaves_no_roles_to_choose(path: str) -> None:
    words = "data: train_on: all trains every token, whatever the role: leave roles_to_train out"
    overrides = ("data.train_on=all", "data.roles_to_train=[user]")
    assert refusal(path, *overrides).startswith(f"{path}: {words}")
    assert load_config(path, ["data.chat_template_kwargs="]).data.chat_template_kwargs == {}


def test_layers() -> None:
    def resolve(layers: object, n_layers: int = 5) -> list[int]:
        return AdapterConfig.model_validate({"layers": layers}).resolve_layers(n_layers)

    assert resolve("all") == [0, 1, 2, 3, 4]
    assert resolve({"last": 2}) == [3, 4]
    assert resolve({"last": 5}) == [0, 1, 2, 3, 4]
    assert resolve([3, 0]) == [0, 3]
    with pytest.raises(InputError, match=r"got \{last: 6\}, but the model has 5 layers\."):
        resolve({"last": 6})
    with pytest.raises(InputError, match="got the layer 5, but the model has 5 layers, numbered 0"):
        resolve([0, 5])


def test_targets_of_a_model() -> None:
    assert AdapterConfig().resolve_targets(LLAMA) == [
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    ]
    assert AdapterConfig().resolve_targets(PHI3) == [
        *("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    ]
    adapter = AdapterConfig(targets=["lm_head", "v_proj", "q_proj"])
    assert adapter.resolve_targets(LLAMA) == ["q_proj", "v_proj", "lm_head"]
    with pytest.raises(InputError, match=r"got 'v_proj', but a model .* 'phi3' has qkv_proj, o_"):
        adapter.resolve_targets(PHI3)


def test_modules_of_a_model() -> None:
    """Names, suffixes, patterns, ranges and exclusions, as PEFT matches them."""

    def paths(**values: object) -> list[str]:
        return list(AdapterConfig.model_validate(values).resolve_modules(LLAMA))

    n_layers = LLAMA.n_layers
    assert len(paths()) == 7 * n_layers
    assert paths(targets="q_proj", layers="1-2") == [
        f"model.layers.{n}.self_attn.q_proj" for n in (1, 2)
    ]
    assert paths(targets=["layers.1.mlp.up_proj"]) == ["model.layers.1.mlp.up_proj"]
    assert paths(targets=r".*layers\.0\..*(gate|up)_proj") == [
        "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"
    ]  # fmt: skip
    assert paths(targets=r"lm_head|.*\.0\.mlp\.up_proj")[-1] == "lm_head"
    every = paths(exclude=["v_proj", "layers.0.mlp.up_proj"])
    assert len(every) == 6 * n_layers - 1 and not [p for p in every if p.endswith("v_proj")]
    assert paths(exclude=r".*self_attn.*") == [p for p in paths() if "mlp" in p]
    values = {
        "rank": 8, "alpha": 16, "rank_pattern": {"mlp.up_proj": 4, "up_proj": 2},
        "alpha_pattern": {r"layers\.0\..*": 4.0},
    }  # fmt: skip
    found = AdapterConfig.model_validate(values).resolve_modules(LLAMA)
    up, down = found["model.layers.0.mlp.up_proj"], found["model.layers.1.mlp.down_proj"]
    assert (up.rank, up.scale, down.rank, down.scale) == (4, 1.0, 8, 2.0)
    for wrong, words in (
        ({"targets": ".*q_prj"}, "'.*q_prj' fits none of the model's paths"),
        ({"targets": ["layers.77.mlp.up_proj"]}, "which fits none of the model's paths"),
        ({"targets": "q_proj", "exclude": ["v_proj"]}, "leave nothing of that name to exclude"),
        ({"targets": "q_proj", "exclude": ["q_proj"]}, "leaves nothing to train"),
        ({"exclude": ".*xyz"}, "'.*xyz' fits none of the paths"),
        ({"variant": "dora", "targets": ["lm_head"]}, "dora is not supported for lm_head"),
        ({"variant": "dora", "targets": ["q_proj", "embed_tokens"]}, "variant: dora is not supp"),
        ({"loraplus_lr_ratio": 2.0, "targets": "embed_tokens"}, "loraplus_lr_ratio is not supp"),
        ({"trainable_tokens": [3], "targets": "embed_tokens"}, "trainable_tokens is not supported"),
        ({"rank_pattern": {"lm_head": 4}}, "'lm_head' fits none of the adapted matrices"),
    ):
        with pytest.raises(InputError) as caught:
            paths(**wrong)
        assert words in str(caught.value)


def test_scale() -> None:
    assert AdapterConfig(rank=4, alpha=6).scale == 1.5
    assert math.isclose(AdapterConfig(rank=4, alpha=6, variant="rslora").scale, 3.0)
