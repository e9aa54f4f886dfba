//! The products of a decoder's steps, each kind once, for backends that find out beforehand how to make them.

use dist_kernels::Backend;
use dist_kernels::args::Product;
use dist_kernels::weight::Weight;

use super::Decoder;

fn plain<B: Backend>(weight: &Weight<B::Buf>) -> Product<'_, B> {
    Product { weight, has_bias: false, activation: None, is_head: false }
}

impl<B: Backend> Decoder<B> {
    /// Those of all rows of a step, but for the one that fills the cache beside. Layers are alike.
    pub(crate) fn products(&self) -> Vec<Product<'_, B>> {
        let mut products = Vec::new();
        if let Some(block) = self.blocks.first() {
            let (has_bias, activation) = (block.fc1.bias.is_some(), Some(self.shape.activation));
            products.push(plain(&block.proj.weight));
            products.push(Product { weight: &block.fc1.weight, has_bias, activation, is_head: false });
            products.push(plain(&block.fc2.weight));
        }
        let project_in = self.tables.as_ref().and_then(|tables| tables.project_in.as_ref());
        products.extend(project_in.map(plain));
        products
    }

    /// Those of the rows whose logits are wanted.
    pub(crate) fn head_products(&self) -> Vec<Product<'_, B>> {
        let Some(head) = &self.head else { return Vec::new() };
        let mut products: Vec<_> = head.project_out.iter().map(plain).collect();
        let weight = head.weight.as_ref().or(self.tokens.as_ref());
        products.extend(weight.map(|weight| Product { is_head: true, ..plain(weight) }));
        products
    }
}
