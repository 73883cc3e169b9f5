"""The licences that the Hub supports by name, and the check of licence options.

From https://huggingface.co/docs/hub/repositories-licenses; huggingface_hub contains no list of licences.
"""

import difflib

LICENSES = frozenset(
    """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    openrail++ afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0
    cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0
    cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0
    cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl
    gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0
    odc-by odbl openmdw-1.0 osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
    fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown
    """.split()
)
OTHER = "other"


def check_license(name: str | None, other_name: str | None = None, other_link: str | None = None) -> None:
    """
    Check the options for a licence.

    Args:
        name: the identifier of the licence, if given.
        other_name, other_link: name and link of a licence that is not on the Hub's list.

    Raises:
        ValueError: the licence is not on the Hub's list; its name and link are missing; or they are given although the
            licence is on the list.
    """
    if name not in (None, OTHER) and name not in LICENSES:
        close = difflib.get_close_matches(name.lower(), LICENSES, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "see https://huggingface.co/docs/hub/repositories-licenses."
        raise ValueError(
            f"--license is {name!r}, which is not a licence on the Hub's list: {hint} For any other licence, set "
            f"--license {OTHER} with --license_name and --license_link."
        )
    if name == OTHER and (not other_name or not other_link):
        raise ValueError(f"--license {OTHER} requires --license_name and --license_link, which the Hub shows.")
    if name != OTHER and (other_name or other_link):
        raise ValueError(f"--license_name and --license_link require --license {OTHER}; --license is {name!r}.")
