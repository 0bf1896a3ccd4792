"""The compiler passes, in the order in which they run.

:func:`fmpq_fx.prepare` runs all but the last two, which :func:`fmpq_fx.convert` runs.

==================  ===========================================  =====================================
pass                takes and returns                            what it does
==================  ===========================================  =====================================
``trace``           model, image -> GraphModule                  records the model as a graph
``check_trace``     model, GraphModule, images                   holds that both compute the same
``sites``           GraphModule -> sites                         finds the layers to quantize, and marks their nodes
``sensitivity``     GraphModule, images -> Sensitivity           measures the RD loss of each bit-width
``plan``            Sensitivity, target -> Plan                  assigns bits to every site (``planners``)
``lazy``            task, GraphModule, images -> Plan            measures only what the plan depends on
``rewrite``         GraphModule, Plan -> GraphModule             swaps in quantized layers
``scales``          GraphModule, images -> GraphModule           chooses where weights are clipped
``calibrate``       GraphModule, images -> GraphModule           sets the ranges of activations
``entropy_path``    GraphModule -> EntropyPath                   finds the layers that choose the CDFs of the latents
``integerize``      model, EntropyPath -> model                  lowers them to exact integer arithmetic
==================  ===========================================  =====================================

Further passes prepare a graph for other runtimes than torch; :func:`fmpq_fx.export_onnx` runs them:

==================  ===========================================  =====================================
``forms``           GraphModule -> GraphModule                   decides which layers can run in 8-bit integers
``parts``           GraphModule -> parts                         cuts it between entropy coding steps
==================  ===========================================  =====================================

One pass finds how large images can be divided into tiles, for :func:`fmpq_fx.encode` and others:

===================  ==========================================  =====================================
``receptive_field``  GraphModule -> reaches                      finds the inputs that each place sees
===================  ==========================================  =====================================

A pass notes its results on the nodes and on the graph, in the records of ``annotation``: ``note_of(node)`` reads the
record of a node, ``graph_note(gm)`` that of the graph, and ``plan_of(gm)`` the plan in it.
"""
