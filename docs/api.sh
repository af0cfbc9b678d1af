#!/bin/sh
# Builds the API reference from the docstrings: docs/api.sh [FOLDER]. Needs the extra docs and no network.
set -eu
out=$(realpath -m "${1:-build/api}")
cd "$(dirname "$0")/.."
# Warnings are errors, except those of annotations that pdoc cannot read, of a NamedTuple (its bug 765) and ruamel.yaml's;
# mypy checks ours.
# It would also stop, and warn of, what libraries run while they are imported, as `uname`.
students=pipeline.models.students
PDOC_ALLOW_EXEC=1 python -W error -W "ignore:Error parsing type annotation:UserWarning:pdoc.doc_types" \
    -m pdoc --docformat google --output-directory "$out" pipeline stages.python \
    $students.layers $students.vit $students.deit $students.tnt $students.titn
echo "$out/index.html"
