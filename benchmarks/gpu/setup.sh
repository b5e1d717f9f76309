# To be sourced from the checkout's root on a GPU machine without network:  . benchmarks/gpu/setup.sh
# Unpacks the wheels of wheelhouse/packages and puts them, and this checkout, on Python's path.
packages="${GPU_PACKAGES:-$PWD/runs/gpu-packages}"
mkdir -p "$packages"
python3 -m pip --disable-pip-version-check install --quiet --no-index --no-deps --upgrade \
    --target "$packages" wheelhouse/packages/*.whl ||
    for wheel in wheelhouse/packages/*.whl; do python3 -m zipfile -e "$wheel" "$packages"; done
export PYTHONPATH="$PWD:$PWD/kernels:$packages${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
python3 -c "import sae_lens_switch, torch; print(sae_lens_switch.__file__, torch.__version__, torch.cuda.is_available())"
