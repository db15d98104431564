from meansparse_cli import errors


def test_every_cause_has_its_own_exit_code() -> None:
    causes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.MeanSparseError)]
    codes = [c.exit_code for c in causes]
    assert len(causes) > 10
    assert len(set(codes)) == len(codes)
    assert not {0, 2, 130} & set(codes), "Typer's usage error, success and Ctrl-C have theirs"
    for cause in causes[1:]:
        assert f"{cause.__name__} " in (errors.__doc__ or "")
        assert f" {cause.exit_code} " in (errors.__doc__ or "")
