"""The package definition; versions are pinned in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

# The maintained line of OpenMMLab's packages; import names mmcv, mmengine, mmseg, mmpretrain.
MM = ['onedl-mmcv', 'onedl-mmengine', 'onedl-mmsegmentation', 'onedl-mmpretrain']
# They build the documentation; myst-nb needs Python 3.11.
DOCS = ['sphinx', 'furo', 'myst-nb', 'sphinx-copybutton', 'ipykernel']

setup(
    name='csg_seg',
    version='0.3.0',
    description='Model compression for segmentation networks with a Convolutional Slice Generator',
    long_description=Path(__file__).with_name('README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    packages=find_packages(include=['csg_seg', 'csg_seg.*']),
    # Configs and tools, which mim and 'csg_seg::' bases look for there; links to the folders of this project.
    package_data={'csg_seg': ['.mim/model-index.yml', '.mim/configs/**/*', '.mim/tools/**/*']},
    entry_points={'console_scripts': ['csg-seg = csg_seg.cli.main:main']},
    python_requires='>=3.10,<3.15',
    install_requires=['torch>=2.6', 'numpy', 'safetensors>=0.4'],
    extras_require={
        'mm': [*MM, 'torchvision', 'pillow', 'matplotlib', 'rich', 'scipy'],
        'data': ['pillow', 'pycocotools', 'rich'],
        'onnx': ['onnx', 'onnxruntime', 'onnxscript'],
        'docs': [f"{name}; python_version >= '3.11'" for name in DOCS],
        'dev': [
            'setuptools',
            'pytest',
            'pytest-xdist',
            'ruff',
            'mypy',
            'timm',
            'tensorly',
            'tensorly-torch',
            'torch-pruning',
        ],
    },
)
