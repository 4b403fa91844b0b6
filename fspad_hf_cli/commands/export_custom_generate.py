ABOUT = "write a Hub repository folder for generate(custom_generate=...)"


def add_arguments(parser) -> None:
    parser.add_argument("directory", metavar="DIR", help="where to write the repository")


def run(directory: str) -> int:
    from fspad_hf.custom_generate import export_custom_generate

    folder = export_custom_generate(directory)
    print(f"Written to {folder}: upload it with `hf upload user/name {directory}`.")
    return 0
