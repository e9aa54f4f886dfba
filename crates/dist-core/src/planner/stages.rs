//! How many layers each pipeline stage gets: even in time, or, where that does not fit, even in memory.

use super::Request;
use crate::cost::{CostModel, StepShape};
use crate::plan::{WeightBytes, heads_local};
use crate::{Coord, KvLayout, Mesh, ModelConfig};

/// Deals layers one by one to the stage that is least loaded afterwards, the first such one; at least one each.
///
/// Stage `i` with `n` layers has load `fixed[i] + n · a_layer[i]`. Since all layers are alike the largest load is the
/// smallest possible.
fn deal(n_layers: usize, fixed: &[f64], a_layer: &[f64]) -> Vec<usize> {
    let mut stages = vec![1; fixed.len()];
    for _ in fixed.len()..n_layers {
        let load = |&i: &usize| fixed[i] + (stages[i] + 1) as f64 * a_layer[i];
        let next = (0..fixed.len()).min_by(|a, b| load(a).total_cmp(&load(b)));
        stages[next.expect("a mesh has a stage")] += 1;
    }
    stages
}

impl Request<'_> {
    /// Even in the time of a decode step.
    pub(super) fn stages_by_time(&self, mesh: Mesh) -> Vec<usize> {
        let seconds = |n_layers: usize| {
            let model = ModelConfig {
                n_layers: n_layers * mesh.pp,
                windows: vec![None; n_layers * mesh.pp],
                ..self.model.clone()
            };
            let cost = CostModel {
                model: &model,
                mesh,
                stages: &vec![n_layers; mesh.pp],
                act_dtype: self.options.act_dtype,
                wire_dtype: self.options.wire_dtype,
                kv_dtype: self.options.kv_dtype,
            };
            let shape = StepShape::decode(self.n_running(mesh), self.workload.prompt_len);
            cost.stage_seconds(self.topology, 0, shape)
        };
        let (one, two) = (seconds(1), seconds(2));
        let a_layer: Vec<f64> = one.iter().zip(&two).map(|(one, two)| two - one).collect();
        let fixed: Vec<f64> = one.iter().zip(&a_layer).map(|(one, a_layer)| one - a_layer).collect();
        deal(self.model.n_layers, &fixed, &a_layer)
    }

    /// Even in the share of memory that is taken.
    pub(super) fn stages_by_memory(&self, mesh: Mesh) -> Vec<usize> {
        let bytes = WeightBytes::of(self.model, mesh.tp, 0, self.options.act_dtype);
        let kv = KvLayout {
            n_layers_local: 1,
            n_kv_heads_local: heads_local(self.model, mesh.tp, 0).1,
            d_head: self.model.d_head,
            dtype: self.options.kv_dtype,
            block_size: self.options.block_size,
        };
        let layer = bytes.layer + (self.needed_blocks(mesh) * kv.bytes_per_block()) as u64;
        let of_stage = |bytes: u64, pp: usize| {
            let ranks = (0..mesh.tp).map(|tp| self.available(mesh.rank(Coord { tp, pp, dp: 0 })));
            bytes as f64 / ranks.min().unwrap_or(0).max(1) as f64
        };
        let fixed: Vec<f64> = (0..mesh.pp).map(|pp| of_stage(bytes.beside_layers(pp, mesh.pp), pp)).collect();
        let a_layer: Vec<f64> = (0..mesh.pp).map(|pp| of_stage(layer, pp)).collect();
        deal(self.model.n_layers, &fixed, &a_layer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stage_with_the_head_gets_fewer_layers() {
        assert_eq!(deal(10, &[0.0, 0.0], &[1.0, 1.0]), [5, 5]);
        assert_eq!(deal(10, &[0.0, 2.0], &[1.0, 1.0]), [6, 4]);
        assert_eq!(deal(7, &[0.0, 0.0, 100.0], &[1.0, 1.0, 1.0]), [3, 3, 1]);
        assert_eq!(deal(9, &[0.0, 0.0], &[1.0, 2.0]), [6, 3]);
    }
}
