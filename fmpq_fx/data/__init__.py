"""What comes with the package, so that it runs anywhere: trained sample models, and photographs.

In come a lambda and the names of photographs; out come a model and images. It may import nothing of the package.
"""
