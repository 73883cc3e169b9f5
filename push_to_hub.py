"""Publishes a finished run on the Hub: build, check, show, upload in one commit, download again and compare.

python push_to_hub.py runs/demo --repo_id USER/NAME [--private] [--dry_run] [--space USER/SPACE]
"""

from mmcot.push import main

if __name__ == "__main__":
    main()
