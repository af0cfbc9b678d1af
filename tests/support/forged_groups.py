"""Forged links, groups and attributes."""

from __future__ import annotations

import json

import h5py
import numpy as np

from tests.support.forgery import hostile
from tests.support.label_samples import NUM_CLASSES, NUM_SAMPLES


@hostile("does not hold exactly")
def soft_link(file):
    file["hidden"] = file["labels"]
    del file["labels"]
    file["labels"] = h5py.SoftLink("/hidden")


@hostile("'val' is a link")
def soft_link_alone(file):
    del file["clean/val"]
    file["clean/val"] = h5py.SoftLink("/clean/test")


@hostile("'labels' is a link")
def external_link(file):
    del file["labels"]
    file["labels"] = h5py.ExternalLink("honest.h5", "/labels")


@hostile("has a second name")
def second_name(file):
    del file["clean/val"]
    file["clean/val"] = file["clean/test"]


@hostile("has a second name")
def cycle_to_the_root(file):
    file["clean/more"] = file["/"]


@hostile("has a second name")
def cycle_to_itself(file):
    file["clean/more"] = file["clean"]


@hostile("'more' is not a dataset")
def deep_groups(file):
    group = file["clean"]
    for _ in range(2000):
        group = group.create_group("more")


@hostile("is not a name")
def clean_without_a_name(file):
    file.move("clean/val", "clean/no name")


@hostile("'more' is not a dataset")
def clean_nested(file):
    file.create_group("clean/more")


@hostile("/clean is not a group")
def clean_is_a_dataset(file):
    del file["clean"]
    file["clean"] = np.zeros(3, np.uint8)


@hostile("'labels' is not a dataset")
def labels_are_a_group(file):
    del file["labels"]
    file.create_group("labels")


@hostile("'labels' is not a dataset")
def labels_are_a_type(file):
    del file["labels"]
    file["labels"] = np.dtype("u1")


@hostile("/ does not hold exactly")
def extra_object(file):
    file["extra"] = np.zeros(3)


@hostile("/identity does not hold exactly")
def extra_object_beside_identity(file):
    file["identity/extra"] = np.zeros(3)


@hostile("/ does not hold exactly")
def missing_object(file):
    del file["digest"]


@hostile("/ does not hold exactly")
def extra_attribute(file):
    file.attrs["extra"] = 1


@hostile("without attributes")
def extra_attribute_of_the_labels(file):
    file["labels"].attrs["extra"] = 1


@hostile("/identity does not hold exactly")
def extra_field(file):
    file["identity"].attrs["extra"] = np.bytes_("1")


@hostile("/provenance does not hold exactly")
def missing_field(file):
    del file["provenance"].attrs["device"]


@hostile("/provenance does not hold exactly")
def extra_field_of_the_provenance(file):
    file["provenance"].attrs["extra"] = np.bytes_("1")


@hostile("provenance.folded is true")
def folded_as_usual(file):
    file["provenance"].attrs["folded"] = np.bytes_("true")


@hostile("provenance.input_size is 0")
def input_of_no_size(file):
    file["provenance"].attrs["input_size"] = np.bytes_("0")


@hostile("provenance.code_sha256 is null")
def code_without_a_digest(file):
    file["provenance"].attrs["code_sha256"] = np.bytes_("null")


@hostile("expected [] beside given")
def given_by_a_teacher(file):
    file["provenance"].attrs["given"] = np.bytes_("true")


@hostile("provenance.members is []")
def ensemble_of_none(file):
    for key in ("mean", "std", "members"):
        file["provenance"].attrs[key] = np.bytes_("[]")


@hostile("is not that of its members")
def members_of_another_ensemble(file):
    member = {"checkpoint_sha256": "e" * 64, "mean": [0.5], "std": [0.5], "teacher": "resnet50"}
    for key, value in {"mean": [], "std": [], "members": [member, member]}.items():
        file["provenance"].attrs[key] = np.bytes_(json.dumps(value, separators=(",", ":"), sort_keys=True))


@hostile("members[1].input_size is true")
def member_with_an_impossible_field(file):
    member = {"checkpoint_sha256": "e" * 64, "mean": [0.5], "std": [0.5], "teacher": "resnet50"}
    members = [member, {**member, "input_size": True}]
    for key, value in {"mean": [], "std": [], "members": members}.items():
        file["provenance"].attrs[key] = np.bytes_(json.dumps(value, separators=(",", ":"), sort_keys=True))


@hostile("accuracy.val is 101.0")
def accuracy_above_everything(file):
    file.attrs["accuracy"] = np.bytes_('{"val":101.0}')


@hostile('accuracy is {"train":50.0}')
def accuracy_of_a_split_without_labels(file):
    file.attrs["accuracy"] = np.bytes_('{"train":50.0}')


@hostile("accuracy is 7")
def accuracy_of_no_split(file):
    file.attrs["accuracy"] = np.bytes_("7")


@hostile("split is not a text")
def text_of_variable_length(file):
    file["identity"].attrs["split"] = '"train"'


@hostile("split is not a text")
def several_texts(file):
    file["identity"].attrs["split"] = np.array([b'"train"', b'"test"'])


@hostile("num_samples is not a text")
def number_for_text(file):
    file["identity"].attrs["num_samples"] = NUM_SAMPLES


@hostile("split is not a text")
def reference_for_text(file):
    file["identity"].attrs.create("split", file["identity"].ref, dtype=h5py.ref_dtype)


@hostile("split is not a text")
def text_without_space(file):
    file["identity"].attrs["split"] = h5py.Empty("S7")


@hostile("split is not canonical")
def loose_json(file):
    file["identity"].attrs["split"] = np.bytes_('"train" ')


@hostile("Unterminated")
def broken_json(file):
    file["identity"].attrs["split"] = np.bytes_('"train')


@hostile("recursion")
def deep_json(file):
    file["identity"].attrs["split"] = np.bytes_("[" * 100_000)


@hostile("num_samples is 40.0")
def fractional_samples(file):
    file["identity"].attrs["num_samples"] = np.bytes_("40.0")


@hostile("class_names is")
def classes_without_names(file):
    file["identity"].attrs["class_names"] = np.bytes_(json.dumps(list(range(NUM_CLASSES)), separators=(",", ":")))


@hostile("0 entries")
def no_classes(file):
    file["identity"].attrs["class_names"] = np.bytes_("[]")


@hostile("dataset_sha256 is")
def no_digest_of_the_data(file):
    file["identity"].attrs["dataset_sha256"] = np.bytes_('"latest"')


@hostile("checkpoint_sha256 is")
def no_digest_of_the_teacher(file):
    file["provenance"].attrs["checkpoint_sha256"] = np.bytes_("null")


@hostile("samples")
def canaries_of_something_else(file):
    file.attrs["canaries"] = np.bytes_('[{"view":0}]')


@hostile("not iterable")
def canaries_are_no_list(file):
    file.attrs["canaries"] = np.bytes_("7")


@hostile("of more than 4096 samples")
def canaries_of_every_sample_again_and_again(file):
    canary = {"samples": [0] * 5000, "sha256": "0" * 64, "view": 0}
    file.attrs["canaries"] = np.bytes_(json.dumps([canary], separators=(",", ":")))
