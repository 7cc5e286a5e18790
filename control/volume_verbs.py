"""What the API does for volumes. A part of ControlAPI."""

from control.access import Caller
from control.body import RequestError, json_object
from handlers.images import wants


class VolumeVerbs:
    """One method for each verb. `self.server.verbs.volumes` is the Volumes."""

    VOLUME_ROUTES = {
        ('GET', '/api/volume'): 'volumes',
        ('POST', '/api/volume/*'): 'create_volume',
        ('POST', '/api/volume/resize/*'): 'resize_volume',
        ('POST', '/api/volume/snapshot/*'): 'snapshot_volume',
        ('DELETE', '/api/volume/*'): 'remove_volume',
    }

    def _volumes(self, caller: Caller, _: None) -> None:
        self._json(self.server.verbs.volumes.list())

    def _create_volume(self, caller: Caller, name: str) -> None:
        size = self._volume_fields('size').get('size')
        self._change_volume('create', name, None if size is None else size_of(size), caller)

    def _resize_volume(self, caller: Caller, name: str) -> None:
        self._change_volume('resize', name, size_of(self._volume_fields('size').get('size')), caller)

    def _snapshot_volume(self, caller: Caller, name: str) -> None:
        new = self._volume_fields('name').get('name')
        if not isinstance(new, (str, type(None))):
            raise RequestError(400, "'name' is not a text")
        self._change_volume('snapshot', name, new, caller)

    def _remove_volume(self, caller: Caller, name: str) -> None:
        with self.server.verbs.functions.changes.one():
            self.server.verbs.volumes.remove(name, f'by {caller}')
        self._answer(b'')

    def _volume_fields(self, known):
        fields = json_object(self._body.whole() or b'{}')
        if fields.keys() - {known}:
            raise RequestError(400, f"there is only the field '{known}'")
        return fields

    def _change_volume(self, verb, name, value, caller):
        self._deadline.cancel()
        with self.server.verbs.functions.changes.one():
            answer = getattr(self.server.verbs.volumes, verb)(name, value, f'by {caller}')
        self._json(answer)


def size_of(text: object) -> int:
    """The bytes in '1G', or in a number. Raises RequestError."""
    try:
        return wants.size(1, 1 << 44)(text)
    except (ValueError, TypeError) as error:
        raise RequestError(400, "'size' is not a size such as 1G") from error
