#!/bin/sh
# Builds the API reference from the docstrings: docs/api.sh [FOLDER]. Needs the extra docs and no network.
set -eu
out=$(realpath -m "${1:-build/api}")
cd "$(dirname "$0")/.."
# Warnings are errors, but for one: pdoc cannot read the annotations of a NamedTuple (its bug 765).
# It would also stop, and warn of, what libraries run while they are imported, as `uname`.
PDOC_ALLOW_EXEC=1 python -W error -W "ignore:Error parsing type annotation ForwardRef:UserWarning:pdoc.doc_types" \
    -m pdoc --docformat google --output-directory "$out" pipeline \
    pipeline.models.students.layers pipeline.models.students.vit pipeline.models.students.deit pipeline.models.students.tnt pipeline.models.students.titn
echo "$out/index.html"
