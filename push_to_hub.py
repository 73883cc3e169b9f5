"""Publishes a finished run on the Hub: checks and lists its files, uploads them in one commit, verifies a download.

python push_to_hub.py runs/demo --repo_id USER/NAME [--private] [--dry_run] [--space USER/SPACE]
"""

from mmcot.push import main

if __name__ == "__main__":
    main()
