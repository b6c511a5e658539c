# What an installed `ldm` can do, from an empty folder:  make test-install
ldm
ldm list
ldm list experiment
for stage in clip autoencoder diffusion; do
  experiment=$stage && test $stage != diffusion || experiment=text
  ldm train experiment=emoji/$experiment run_id=quickstart/$stage trainer.max_steps=5
done
ldm sample model=runs/quickstart/diffusion prompt='[red apple,fox]' out=drawn
ldm evaluate model=runs/quickstart/diffusion 'metric=[reconstruction]' out=measured
ldm precompute model=runs/quickstart/autoencoder out=latents
ldm convert runs/quickstart/diffusion converted --to ldm
ldm sample model=converted prompt=fox out=again

mkdir pictures
cp drawn/0*.png pictures
ldm pack pictures packed --size 32
ldm doctor packed

# Configs of one's own: beside the command, and in a package.
mkdir -p configs/sampler mine/configs/sampler
printf '# Three steps of Euler.\n_target_: ldm.sampler.euler.Euler\nsteps: 3\n' | tee configs/sampler/three.yaml > mine/configs/sampler/packaged.yaml
touch mine/__init__.py mine/configs/__init__.py
ldm list sampler | grep 'Three steps'
ldm sample model=converted prompt=fox sampler=three out=three
ldm sample model=converted prompt=fox sampler=packaged 'hydra.searchpath=[pkg://mine.configs]' out=packaged

# A mistake is one line.
if ldm train experiment=emoji/txt 2> mistake; then exit 1; fi
test "$(wc -l < mistake)" = 1
echo "An installed ldm works."
