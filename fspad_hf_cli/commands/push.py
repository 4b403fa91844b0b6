ABOUT = "upload a draft's folder to the Hub: configuration, weights, tokenizer and a model card"


def add_arguments(parser) -> None:
    parser.add_argument("folder", metavar="DIR", help="what save_pretrained or `fspad-hf train` wrote")
    parser.add_argument("--repo-id", metavar="USER/NAME", help="where to (default: the folder's name, as your own)")
    parser.add_argument("--target-name", metavar="HUB_ID", help="the target, if config.json names a local folder")
    parser.add_argument("--dry-run", action="store_true", help="show what would be uploaded, upload nothing")
    repo = parser.add_argument_group("repository (the token is $HF_TOKEN, or that of `hf auth login`)")
    repo.add_argument("--revision", metavar="BRANCH", help="push to a branch; made if need be")
    repo.add_argument("--private", action="store_true", default=None, help="if the repository is new, make it private")
    repo.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    repo.add_argument("--commit-message", metavar="TEXT")
    card = parser.add_argument_group("model card (one that is there already, here or on the Hub, is kept)")
    card.add_argument("--overwrite-card", action="store_true", help="make a new one all the same")
    card.add_argument("--results", metavar="FILE", help="results.json of fspad-hf bench: tau and speed-up")
    card.add_argument("--license", metavar="ID", help="such as apache-2.0")
    card.add_argument("--dataset", dest="datasets", action="append", metavar="HUB_ID", help="may be repeated")
    card.add_argument("--tag", dest="tags", action="append", metavar="TAG", help="may be repeated")


def run(**options) -> int:
    from fspad_hf.hub import push_folder

    commit = push_folder(**options)
    if options["dry_run"]:
        for file in commit:
            print(f"{file.upload_info.size:>12,} bytes  {file.path_in_repo}")
        return 0
    print(commit.pr_url or commit.commit_url)
    return 0
