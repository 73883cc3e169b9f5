"""Upload a finished run to the Hub, in one commit.

python push_to_hub.py runs/demo --repo_id USER/NAME [--private] [--dry_run]
"""

import argparse
import sys

from mmcot.hub import files_to_upload, upload


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", help="a finished run's folder")
    parser.add_argument("--repo_id", required=True, help="USER/NAME on the Hub")
    parser.add_argument("--private", action="store_true", help="make the repository private, if it is created")
    parser.add_argument("--dry_run", action="store_true", help="only list what would go up")
    arguments = parser.parse_args()
    try:
        for file, size in files_to_upload(arguments.run_dir):
            print(f"{size:>12,}  {file}")
        if arguments.dry_run:
            print(f"Dry run: nothing was uploaded to {arguments.repo_id}.")
        else:
            print(upload(arguments.run_dir, arguments.repo_id, arguments.private))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
