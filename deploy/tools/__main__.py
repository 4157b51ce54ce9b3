"""Write the files in deploy/ that follow from the code."""

from deploy.tools import catalogue, dashboard, rules


def main() -> None:
    """Each says where it stands."""
    for path, text in {
        catalogue.DOCUMENT: catalogue.text(),
        dashboard.DASHBOARD: dashboard.text(),
        **rules.files(),
    }.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


if __name__ == "__main__":
    main()
