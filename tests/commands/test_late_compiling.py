"""What libraries compile at their import is compiled when it is first called, if at all."""

import torch

from trl_lightreasoner.commands.late_compiling import compiling_late


def test_a_function_is_compiled_at_its_first_call():
    compiled = []

    def backend(module, inputs):
        compiled.append(module)
        return module.forward

    compile_now = torch.compile
    with compiling_late():

        @torch.compile(backend=backend)
        def double(values):
            """Twice as much."""
            return 2 * values

    assert torch.compile is compile_now
    assert not compiled
    assert double.__doc__ == "Twice as much."
    for _ in range(2):
        assert double(torch.ones(3)).tolist() == [2, 2, 2]
    assert len(compiled) == 1


def test_functions_are_compiled_with_their_own_settings():
    with compiling_late():
        bare = torch.compile(lambda values: values + 1, backend="eager")

        @torch.compile(disable=True)
        def never(values):
            return values - 1

    assert bare(torch.ones(2)).tolist() == [2, 2]
    assert never(torch.ones(2)).tolist() == [0, 0]
