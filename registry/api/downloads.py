"""The route of downloads: signed GETs for the files of versions, many versions at once."""

from fastapi import APIRouter

from registry.schemas import DownloadInfo, DownloadRequest
from registry.services import downloads

from .deps import Parts, User

router = APIRouter(prefix="/v1", tags=["downloads"])


@router.post("/downloads")
def download(request: DownloadRequest, parts: Parts, caller: User) -> DownloadInfo:
    """Signed GETs for every file of the named manifests."""
    with parts.database.read() as session:
        return downloads.download(session, parts.store, parts.settings, caller, request.manifests)
