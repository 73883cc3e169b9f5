#!/usr/bin/env bash
# Installs each minor version of transformers, with the packages that it pins, into a folder of its own. torch and all
# other packages come from the shared environment.
# tests/make_versions.sh FOLDER PIP [VERSION …]; the default is every minor version from 5.12 on, and 4.57.6, because
# mmcot must refuse it.
set -euo pipefail
folder=$1 pip=$2
shift 2
versions=("$@")
[ ${#versions[@]} -gt 0 ] || versions=(4.57.6 5.12.1 5.13.1 5.14.1 5.15.1 5.16.1 5.17.0 5.18.0 5.19.0 5.20.2 5.21.1 5.22.2 5.23.0)
mkdir -p "$folder"
for version in "${versions[@]}"; do
    [ -d "$folder/$version" ] && continue
    case $version in
        4.*) pinned=(tokenizers==0.22.1 huggingface-hub==0.36.0) ;;
        5.1[2-5].*) pinned=(tokenizers==0.22.2 huggingface-hub==1.31.0) ;;
        5.1[67].*) pinned=(huggingface-hub==1.31.0) ;;
        *) pinned=() ;;
    esac
    rm -rf "$folder/$version.tmp"
    "$pip" install -q --no-deps --target "$folder/$version.tmp" "transformers==$version" "${pinned[@]}"
    mv "$folder/$version.tmp" "$folder/$version"
done
