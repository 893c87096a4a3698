"""The folders of a data set whose classes are the names of its folders."""

from pathlib import Path

from task.files import check_readable

# What macOS, Linux, Windows, Synology and QNAP put into folders of their users.
SYSTEM_FOLDERS = frozenset(
    {
        *("__MACOSX", "lost+found", "$RECYCLE.BIN", "System Volume Information"),
        *("@eaDir", "#recycle", "@Recycle"),
    }
)


def is_hidden(folder: str) -> bool:
    """Whether a folder of this name is hidden, or one that a system keeps for itself."""
    return folder.startswith(".") or folder in SYSTEM_FOLDERS


def require_folder(root: Path) -> None:
    """Raise a FileNotFoundError unless there is a folder of images.

    Raises:
        FileNotFoundError: there is none.
    """
    if not root.is_dir():
        raise FileNotFoundError(
            f"data.root={root}: there is no such folder; set it to that of the images"
        )


def class_folders(folder: Path) -> list[str]:
    """Name the folders in a folder, sorted, without hidden ones; none where there is no folder."""
    if not folder.is_dir():
        return []
    names = (path.name for path in folder.iterdir() if path.is_dir())
    return sorted(name for name in names if not is_hidden(name))


def image_classes(root: Path) -> list[str]:
    """Name the folders of classes in a tree of images, `root/train/<class>` or `root/<class>`."""
    if root.is_dir():
        check_readable(root)
    return class_folders(root / "train") or class_folders(root)


def classes_below(root: Path) -> list[str]:
    """Name the classes of a tree of images by its folders; see `image_classes`.

    Raises:
        FileNotFoundError: there is no such tree, or it has no folders.
    """
    require_folder(root)
    if not (classes := image_classes(root)):
        raise FileNotFoundError(
            f"data.root={root}: no class folders there; put the images of each class into a "
            f"folder named as the class, and those of a single class into one, e.g. {root}/cells/"
        )
    return classes
