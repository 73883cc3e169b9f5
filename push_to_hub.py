"""Publish a finished run on the Hub: built, checked, shown, uploaded in one commit, downloaded again and compared.

python push_to_hub.py runs/demo --repo_id USER/NAME [--private] [--dry_run] [--space USER/SPACE]
"""

from mmcot.push import main

if __name__ == "__main__":
    main()
