"""The route that exchanges the code of a login link for keys."""

from typing import Annotated

from fastapi import Depends, FastAPI, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from ...admin_schemas import Login
from ...admission.login_codes import LoginCodes
from ...errors import Unauthenticated
from ..dependencies import no_options

CODE = HTTPBearer(auto_error=False)


def add_login_route(api: FastAPI, codes: LoginCodes) -> None:
    """Add `POST /v1/login`. The code is in the `Authorization` header, which logs mask; the route has no body."""

    @api.post("/v1/login", summary="Exchange the code of a login link for keys", dependencies=[Depends(no_options)])
    async def log_in(credentials: Annotated[HTTPAuthorizationCredentials | None, Security(CODE)]) -> Login:
        if credentials is None:
            raise Unauthenticated("Send the header `Authorization: Bearer <code of the login link>`.")
        return await codes.redeem(credentials.credentials)
